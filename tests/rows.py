"""The rows of all config files at scale=tiny, and the process that trains them.

`python -m tests.rows FOLDER` reads lines of JSON, one list of configs with the same training each;
it trains them once, samples each, and answers with a line: empty, or the error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from condiff_jax.config.identity import identity, stages
from condiff_jax.config.schema import Config
from condiff_jax.objectives.validate import create_config
from configs.__main__ import tables
from tests.compiling import QUICK, collect_rarely

ROOT = Path(__file__).parents[1]


def build(module: dict, name: str, row: str, *arguments: str) -> Config:
    """The validated config of a row; emoji, where a row needs them, are in the folder `emoji`."""
    emoji = ("path=emoji",) if name == "beyond_domains" else ()
    return create_config(module["get_config"](",".join([row, *emoji, *arguments])))


def key(config: Config) -> str:
    """Short and the same for configs with the same training, though not as long."""
    fields = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


def settings(fields: list[dict]) -> set[str]:
    """What the programs of runs are made of: rows with nothing new here have no code of their own.

    Numbers count as zero or not. What only chooses a curve or a size stands for itself: any other
    setting is combined with one of them, not with each.
    """
    found = set()

    def plain(value, field: str = ""):
        if isinstance(value, dict):
            return {name: plain(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        if isinstance(value, str) and field in ("weighting", "schedule", "size"):
            found.add(f"{field}={value}")
            return field
        return value if isinstance(value, bool | str | None) else value != 0

    for values in fields:
        found.add(json.dumps(plain(json.loads(json.dumps(values)))))
    return found


def of_step(stage: Config) -> dict:
    """The fields of a stage that make its train step: of its data, what batches are made of."""
    others = {"init", "sampling", "evaluation", "checkpoint", "log", "steps", "seed", "prepare"}
    fields = {name: v for name, v in dataclasses.asdict(stage).items() if name not in others}
    data = {name: fields["data"][name] for name in ("semantics", "classes", "resolution")}
    return fields | {"data": data | {"encoded": stage.data.name == "latents"}}


def news(found: dict[str, list[dict]]) -> list[str]:
    """The names of all but those with nothing new in their `settings`."""
    seen, kept = set(), []
    for name, fields in found.items():
        new = settings(fields)
        if not new <= seen:
            kept.append(name)
        seen |= new
    return kept


@functools.cache
def groups() -> dict[str, list[Config]]:
    """Rows by training, those with nothing new left out: "table2a:ROW", the first one's: all."""
    found: dict[str, dict[str, Config]] = {}
    for name, module in tables().items():
        for row in module["ROWS"]:
            config = build(module, name, row, "scale=tiny")
            found.setdefault(key(config), {})[f"{name}:{row}"] = config
    named = {next(iter(rows)): list(rows.values()) for rows in found.values()}
    fields = {name: [dataclasses.asdict(row) for row in rows] for name, rows in named.items()}
    return {name: named[name] for name in news(fields)}


@functools.cache
def trained() -> list[str]:
    """The first group of each architecture and objective."""
    firsts = {}
    for name, configs in groups().items():
        firsts.setdefault((configs[0].objective, configs[0].model.name), name)
    return list(firsts.values())


@functools.cache
def steps() -> dict[str, Config]:
    """Stages to lower: those whose train step is none of what `trained` or an earlier one has."""
    by_number = {
        (name, number): stage
        for name in [*trained(), *groups()]
        for number, stage in enumerate(stages(groups()[name][0]), 1)
    }
    names = news({name: [of_step(stage)] for name, stage in by_number.items()})
    return {
        f"{name}, stage {number}": by_number[name, number]
        for name, number in names
        if name not in trained()
    }


def parameters(of_tables: bool) -> tuple[list, list]:
    """(stages to lower, groups to train), of the paper's tables or of all else, as pytest wants.

    All groups are trained in the slow suite, `trained` in both.
    """
    import pytest

    return (
        [name for name in steps() if name.startswith("table") == of_tables],
        [
            name if name in trained() else pytest.param(name, marks=pytest.mark.slow)
            for name in groups()
            if name.startswith("table") == of_tables
        ],
    )


@contextlib.contextmanager
def small_models() -> Iterator[None]:
    """Patch the tiny sizes to few arrays: tracing and compiling take time by their number."""
    from condiff_jax.models import transformer, unet, unet2d

    small = unet.Size((8, 16), (False, True), 16, head_size=8, resnets=0)
    small2d = unet2d.Size((8, 16), (False, False), resnets=0, groups=4)
    with (
        mock.patch.dict(transformer.SIZES, {"tiny": (2, 32, 2)}),
        mock.patch.dict(unet.SIZES, {"tiny": small}),
        mock.patch.dict(unet2d.SIZES, dict.fromkeys(("tiny", "tiny2", "tiny4"), small2d)),
    ):
        yield


def lower(stage: Config) -> None:
    """Trace and lower a train step; compile nothing."""
    from condiff_jax.objectives import diffusion
    from condiff_jax.objectives.vocabulary import load_vocabulary
    from condiff_jax.planning import plan
    from condiff_jax.runtime import sharding

    plan.lower_step(diffusion.create(stage, load_vocabulary(stage)), sharding.local_mesh())


class Trainer:
    """A process of `python -m tests.rows`: one device, and XLA set to compile fast."""

    def __init__(self, folder: Path):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rows", str(folder)],
            cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __call__(self, configs: list[Config]) -> str:
        """Trains and samples; what went wrong, or nothing."""
        line = json.dumps([dataclasses.asdict(config) for config in configs])
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return json.loads(answer) if answer else f"the process has died, see {self.log.name}"

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def sampling_program(config: Config) -> str:
    """The same for configs that only sample with other scales of guidance."""
    scales = ("guidance", "control_guidance")
    values = dataclasses.asdict(config.sampling)
    return json.dumps(values | {name: values[name] == 1 for name in scales})


def run(configs: list[Config], folder: Path) -> None:
    """Train the longest of the configs, which shares its earlier stage, and sample the others.

    Of those that differ in scales alone, one: `test_other_guidance_scales_need_no_other_program`.
    """
    from condiff_jax.runs.workdir import Workdir
    from condiff_jax.sampling import sample
    from condiff_jax.training import loop

    longest = max(configs, key=lambda config: config.steps)
    earlier = longest.init.pretrain
    if earlier is not None:
        path = str(folder / f"{key(earlier)}-{earlier.steps}")
        init = dataclasses.replace(longest.init, path=path)
        longest = dataclasses.replace(longest, init=init)
    workdir = folder / f"{key(longest)}-{longest.steps}"
    assert loop.run(longest, str(workdir))  # its sampling included
    seen = {sampling_program(longest)}
    for number, config in enumerate(configs):
        if (program := sampling_program(config)) not in seen:
            seen.add(program)
            prompts = "" if config.data.semantics == "class" else "red circle; blue ring"
            settings = dataclasses.replace(config.sampling, prompts=prompts, seed=number)
            config = dataclasses.replace(config, sampling=settings, init=longest.init)
            out = sample.run(config, str(workdir))
            assert len(list(out.glob("0*.png"))) == config.sampling.n
    assert (Workdir(str(workdir)).samples / f"{longest.steps}.png").exists()


def write_pictures(folder: Path) -> None:
    """A webdataset of eight plain pictures with captions."""
    from PIL import Image

    folder.mkdir()
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-00000.tar", "w") as tar:
            for i in range(8):
                png = io.BytesIO()
                Image.new("RGB", (20 + i, 24), (30 * i, 100, 200)).save(png, "PNG")
                for kind, data in (("png", png.getvalue()), ("txt", b"a plain picture")):
                    member = tarfile.TarInfo(f"{i:04d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def main(folder: Path) -> None:
    """Answer requests until the input ends, with models that are quick to compile."""
    from absl import flags

    from tests import tiny

    flags.FLAGS.mark_as_parsed()
    collect_rarely()
    write_pictures(folder / "emoji")
    os.chdir(folder)
    answers = sys.stdout
    with (
        small_models(),
        tiny.random_start(),
        contextlib.redirect_stdout(sys.stderr),
    ):
        for line in sys.stdin:
            error = ""
            try:
                run([create_config(values) for values in json.loads(line)], folder)
            except Exception as problem:  # the row's, not this loop's
                error = f"{type(problem).__name__}: {problem}"
            print(json.dumps(error), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
