"""The map from the paper's cells to commands: `python -m configs > configs/README.md`."""

import math
import runpy
from pathlib import Path

FOLDER = Path(__file__).parent
HEAD = """\
# From the paper to commands

Every cell of the paper's tables and every point of its plots belongs to a row below. A row is a
value of `--config`:

    python -m condiff_jax.main --config=configs/ROW --workdir=DIR                   # train
    python -m condiff_jax.main --config=configs/ROW --workdir=DIR --mode=evaluate   # measure

All rows of a file, and then the report of their results beside the paper's:

    python -m condiff_jax.main --config=configs/FILE.py --workdir=DIR --mode=sweep
    python -m condiff_jax.main --config=configs/FILE.py --workdir=DIR --mode=report

`,scale=small` after a row is the same experiment on the embedded data `shapes`, which needs no
files, and `,scale=tiny` a few steps of it. The default is the paper's scale, which needs
`--config.data.path` (see below), `--config.autoencoder.path` (Stable Diffusion's), for captions
`--config.text_encoder.path` (CLIP ViT-L/14), and for an earlier stage
`--config.init.pretrain.data.path` and so on.

The paper's data sets are prepared once, from the downloaded archives in SRC:

    python -m condiff_jax.main --mode=prepare --config=configs/imagenet1k_256.py \\
      --config.prepare.source=SRC --config.data.path=OUT

and the same with `imagenet22k_256.py` and `cc12m_256.py`; README.md lists the archives. Train with
`--config.data.path=OUT`, and at the smaller scales with `--config.data.name=tfds` as well.

The numbers are the paper's. `?` is a cell that our copy of the paper lacks, or that the paper
leaves empty; `diverged` is its cross. Measure them with mode evaluate and
`--config.evaluation.protocol=imagenet_fid50k` (see README.md). CLIP_COCO has other sampling than
FID (Sec. 3.1), protocol `coco_clip`: 25 steps and a guidance of 5.

Other configs, for your own experiments:

- `imagenet1k_256.py`, `imagenet1k_512.py`, `imagenet22k_256.py`, `cc12m_256.py`, `cc12m_512.py`:
  any architecture and initialization (except `unet` from captions to classes or back, whose two
  sizes differ)
- `quickstart.py`; `classifier.py` with `classifier_guidance.py`; `autoencoder.py` with
  `latent_shapes.py`: no download
- `pictures_64.py`: small images of your own from mode prepare, with classes or captions;
  `emoji_64.py`: the same from webdataset tars
- `cifar10_conditioning.py`: a benchmark, not the paper's, of ways to condition a UNet on its class;
  a new one is a file of a few lines

`condiff_jax/config/schema.py` documents every field, `recipes.py` holds what the tables share.
"""
TAIL = """\
## What has no rows

| part of the paper | how to get it |
| --- | --- |
| Table 1, first block | citations, see above: not trained here, nor by the paper |
| Table A4 | a comparison with SDXL and SD3 in words, without numbers of its own |
| Table A5 | findings in words: those of Tables 2 to 4, A3 and Fig. 8 |
| Fig. 1 | `--config=configs/table1.py:arch=ours,data=cc12m,resolution=512 --mode=sample \
--config.sampling.prompts="a prompt; another"` |
| Fig. 2 | `configs/table2a.py:weighting=unif` and `weighting=cos8` with `--mode=sample \
--config.sampling.control.height=512 --config.sampling.control.width=512`, and other sizes |
| Fig. 3 | gamma_c: `condiff_jax.conditioning.control.Weighting`; no training |
| Figs. 4, 5 | illustrations of what `fig8a.py` and `fig8c.py` compare |
| Fig. 6 | `configs/table2c.py`, both rows, with `--mode=sample --config.sampling.control.flip=1` \
and `=0` |
| Fig. A1 | Eq. 3: `python -c "from condiff_jax.diffusion.schedule import *; \
print(rescale(scaled_linear(), 256, 512).sigma[::100])"`; no training |
| Figs. A3, A4 | not reproduced: gradients of padding tokens and attention maps |
| Fig. A5 | `--config=configs/imagenet1k_512.py --mode=sample --config.sampling.steps=50 \
--config.sampling.guidance=5 --config.sampling.base_resolution=0` |
"""


def cells(values: dict) -> str:
    """The published values of a row: "FID_train 3.08, LPIPS ?"."""
    shown = []
    for name, value in values.items():
        known = "?" if value is None else "diverged" if math.isnan(value) else f"{value:g}"
        shown.append(f"{name} {known}")
    return ", ".join(shown) or "not in the paper"


def section(name: str, module: dict) -> str:
    """A config file's title, rows and notes in Markdown."""
    title = module["__doc__"].splitlines()[0]
    source = module.get("SOURCE", "paper")  # of the numbers
    lines = [f"## {title}", "", f"| row | the {source}'s numbers |", "| --- | --- |"]
    lines += [f"| `{name}.py:{row}` | {cells(module['PAPER'][row])} |" for row in module["ROWS"]]
    if "CITED" in module:
        lines += ["", f"| cited by the {source}, not trained | numbers |", "| --- | --- |"]
        lines += [f"| {row} | {cells(values)} |" for row, values in module["CITED"].items()]
    return "\n".join([*lines, "", *(f"- {note}" for note in module["NOTES"])]) + "\n"


def tables() -> dict[str, dict]:
    """The modules of all config files with rows, in the paper's order, by name."""
    paths = sorted(FOLDER.glob("*.py"), key=lambda path: _order(path.stem))
    modules = {p.stem: runpy.run_path(str(p)) for p in paths if p.stem != "__main__"}
    return {name: module for name, module in modules.items() if "ROWS" in module}


def _order(name: str) -> tuple:
    kinds = ("table", "fig")
    kind = next((i for i, k in enumerate(kinds) if name.startswith(k)), len(kinds))
    return kind, "A" in name, name


def readme() -> str:
    """The whole of README.md."""
    return "\n".join([HEAD, *(section(*item) for item in tables().items()), TAIL])


if __name__ == "__main__":
    print(readme(), end="")
