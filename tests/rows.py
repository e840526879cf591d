"""The rows of all config files at scale=tiny, and a process that trains them.

`python -m tests.rows FOLDER` reads lines of JSON, each a list of configs that share a training. It
trains them once, samples each, and prints a line: an empty string, or the error.
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
    """The validated config of a row; rows that need emoji find them in the folder `emoji`."""
    emoji = ("path=emoji",) if name == "beyond_domains" else ()
    return create_config(module["get_config"](",".join([row, *emoji, *arguments])))


def key(config: Config) -> str:
    """A short key, equal for configs that differ in training length only."""
    fields = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()[:12]


def settings(fields: list[dict]) -> set[str]:
    """Settings that determine which code a run executes; rows with equal settings test the same.

    Numbers are reduced to zero or not zero. Fields that only select a curve or a size are settings
    by themselves, so that each value is tested once instead of in all combinations.
    """
    out = set()

    def plain(value, field: str = ""):
        if isinstance(value, dict):
            return {name: plain(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        if isinstance(value, str) and field in ("weighting", "schedule", "size"):
            out.add(f"{field}={value}")
            return field
        return value if isinstance(value, bool | str | None) else value != 0

    for values in fields:
        out.add(json.dumps(plain(json.loads(json.dumps(values)))))
    return out


def of_step(stage: Config) -> dict:
    """Fields of a stage that determine its train step, including the shapes of its batches."""
    excluded = {"init", "sampling", "evaluation", "checkpoint", "log", "steps", "seed", "prepare"}
    fields = {name: v for name, v in dataclasses.asdict(stage).items() if name not in excluded}
    data = {name: fields["data"][name] for name in ("semantics", "classes", "resolution")}
    return fields | {"data": data | {"encoded": stage.data.name == "latents"}}


def with_new_settings(candidates: dict[str, list[dict]]) -> list[str]:
    """Names of the candidates that have `settings` which no earlier one has."""
    seen, names = set(), []
    for name, fields in candidates.items():
        current = settings(fields)
        if not current <= seen:
            names.append(name)
        seen |= current
    return names


@functools.cache
def groups() -> dict[str, list[Config]]:
    """Groups of rows with the same training, by the name of the first row, such as "table2a:ROW".

    Groups without new `settings` are left out.
    """
    by_key: dict[str, dict[str, Config]] = {}
    for name, module in tables().items():
        for row in module["ROWS"]:
            config = build(module, name, row, "scale=tiny")
            by_key.setdefault(key(config), {})[f"{name}:{row}"] = config
    named = {next(iter(rows)): list(rows.values()) for rows in by_key.values()}
    fields = {name: [dataclasses.asdict(row) for row in rows] for name, rows in named.items()}
    return {name: named[name] for name in with_new_settings(fields)}


@functools.cache
def trained() -> list[str]:
    """Name of the first group of each objective and architecture."""
    firsts = {}
    for name, configs in groups().items():
        firsts.setdefault((configs[0].objective, configs[0].model.name), name)
    return list(firsts.values())


@functools.cache
def steps() -> dict[str, Config]:
    """Stages to lower: train steps that differ from those of `trained` and of earlier stages."""
    by_number = {
        (name, number): stage
        for name in [*trained(), *groups()]
        for number, stage in enumerate(stages(groups()[name][0]), 1)
    }
    names = with_new_settings({name: [of_step(stage)] for name, stage in by_number.items()})
    return {
        f"{name}, stage {number}": by_number[name, number]
        for name, number in names
        if name not in trained()
    }


def parameters(of_tables: bool) -> tuple[list, list]:
    """Pytest parameters (stages to lower, groups to train), of the tables or of other config files.

    The slow suite trains all groups, the default suite only those of `trained`.
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
    """Patch the tiny sizes to few arrays, as tracing and compiling time grow with their number."""
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
    """Trace and lower a train step, without compiling."""
    from condiff_jax.objectives import diffusion
    from condiff_jax.objectives.vocabulary import load_vocabulary
    from condiff_jax.planning import plan
    from condiff_jax.runtime import sharding

    plan.lower_step(diffusion.create(stage, load_vocabulary(stage)), sharding.local_mesh())


class Trainer:
    """A process of `python -m tests.rows` with one device and fast compilation."""

    def __init__(self, folder: Path):
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
        self.log = (folder / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.rows", str(folder)],
            cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip

    def __call__(self, configs: list[Config]) -> str:
        """Train and sample; returns the error, or an empty string."""
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
    """A key of the sampling program, equal for configs that differ in guidance scales only."""
    scales = ("guidance", "control_guidance")
    values = dataclasses.asdict(config.sampling)
    return json.dumps(values | {name: values[name] == 1 for name in scales})


def run(configs: list[Config], folder: Path) -> None:
    """Train the config with the most steps and sample the others.

    Earlier stages are shared. Of configs that differ in guidance scales only, one is sampled: see
    `test_other_guidance_scales_need_no_other_program`.
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
    assert loop.run(longest, str(workdir))  # includes sampling
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


def write_images(folder: Path) -> None:
    """Write a webdataset of eight plain images with captions."""
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
    """Train and sample each line of stdin, with models that compile fast."""
    from absl import flags

    from tests import tiny

    flags.FLAGS.mark_as_parsed()
    collect_rarely()
    write_images(folder / "emoji")
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
            except Exception as problem:  # reported to the parent process
                error = f"{type(problem).__name__}: {problem}"
            print(json.dumps(error), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
