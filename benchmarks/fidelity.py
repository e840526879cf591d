"""FID, KID, precision and recall against torch-fidelity, from two folders of images.

    pip install --no-deps --target=DIR torch-fidelity==0.4.0
    python -m benchmarks.fidelity --torch-fidelity=DIR [--weights=FILE]

torch-fidelity is not installed like other packages, because it contains a package `tests` and needs
torchvision, of which this file mocks the few names used. FILE is pytorch-fid's
pt_inception-2015-12-05-6726825d.pth. Without it the weights are random: the numbers are meaningless
but must agree. Prints both sides and exits with 1 where they differ by more than LIMIT; results go
to benchmarks/results/fidelity.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
from PIL import Image

from benchmarks import torch_inception
from condiff_jax.data.shapes import make_scene, render
from condiff_jax.evaluation.feature_networks import load_inception
from condiff_jax.evaluation.metrics import fid
from condiff_jax.evaluation.metrics.features import FeatureNetwork, read_folder
from condiff_jax.evaluation.metrics.kid import kid
from condiff_jax.evaluation.metrics.precision_recall import precision_recall
from condiff_jax.models import inception
from condiff_jax.pretrained.layout import to_torch

LIMIT = 1e-3
COUNT, SIDE = 40, 64  # images in a folder, and their sides in pixels
SUBSETS, SUBSET = 10, 30
RESULTS = Path(__file__).parent / "results" / "fidelity.json"
KEYS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "kid_std": "kernel_inception_distance_std",
    "precision": "precision",
    "recall": "recall",
}


def import_torch_fidelity(folder: str):
    """torch_fidelity from a folder, without torchvision."""
    sys.path.append(folder)
    torchvision = mock.MagicMock()
    functions = torchvision.transforms.functional
    functions.pil_to_tensor = lambda image: torch.tensor(np.asarray(image)).permute(2, 0, 1)
    torchvision.transforms.Compose = lambda steps: steps[0]  # the only one
    mocks = {
        "torchvision": torchvision,
        "torchvision.datasets": torchvision.datasets,
        "torchvision.transforms": torchvision.transforms,
        "torchvision.transforms.functional": functions,
    }
    with mock.patch.dict(sys.modules, mocks):
        import torch_fidelity
    return torch_fidelity


def write_folders(root: Path) -> tuple[str, str]:
    """Write scenes of `shapes` with and without noise; return the folders (noisy, clean)."""
    rng = np.random.default_rng(0)
    for i in range(2 * COUNT):
        image = render(make_scene("train", i), SIDE, SIDE)
        if i >= COUNT:
            image = np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8)
        path = root / ("noisy" if i >= COUNT else "clean") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return str(root / "noisy"), str(root / "clean")


def random_weights(path: Path) -> str:
    """Write a file with the published layout and random weights; return its path."""
    x = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    shapes = jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), x)["params"]
    empty = to_torch(jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes))
    state = torch_inception.random_state({name: a.shape for name, a in empty.items()})
    torch.save({name: torch.tensor(a) for name, a in state.items()}, path)
    return str(path)


def measure(network: FeatureNetwork, generated: str, reference: str) -> dict[str, float]:
    """Our metrics of two folders."""
    statistics, features = [], []
    for folder in (generated, reference):
        parts = []
        statistics.append(fid.measure(network, read_folder(folder), parts))
        features.append(np.concatenate(parts))
    values = fid.fid(*statistics) | kid(*features, subsets=SUBSETS, size=SUBSET)
    return values | precision_recall(*features)


def main() -> int:
    """Print and record both sides; return 1 if they differ, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch-fidelity", required=True, metavar="DIR")
    parser.add_argument("--weights", default="")
    arguments = parser.parse_args()
    torch_fidelity = import_torch_fidelity(arguments.torch_fidelity)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        folders = write_folders(root)
        weights = arguments.weights or random_weights(root / "weights.pth")
        expected = torch_fidelity.calculate_metrics(
            input1=folders[0],
            input2=folders[1],
            fid=True,
            kid=True,
            prc=True,
            feature_extractor="inception-v3-compat",  # the default for precision is VGG16
            feature_extractor_weights_path=weights,
            kid_subsets=SUBSETS,
            kid_subset_size=SUBSET,
            cuda=False,
            cache=False,
            save_cpu_ram=True,  # no worker processes
            verbose=False,
        )
        values = measure(load_inception(weights), *folders)
    rows, worst = [], 0.0
    for name, key in KEYS.items():
        error = abs(values[name] - expected[key]) / max(abs(expected[key]), 1e-9)
        rows.append({"metric": name, "ours": values[name], "theirs": expected[key], "error": error})
        worst = max(worst, error)
        print(f"{name:<10}{values[name]:>14.7g}{expected[key]:>14.7g}{error:>10.1e}")
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    versions["torch_fidelity"] = torch_fidelity.__version__
    record = {"pictures": COUNT, "side": SIDE, "random_weights": not arguments.weights}
    RESULTS.write_text(json.dumps(record | {"versions": versions, "rows": rows}, indent=2) + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
