"""A run that is killed many times ends with the same parameters as an uninterrupted one."""

import json
import random
import time

import jax
import numpy as np
import pytest

from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from tests import tiny
from tests.children import Children

ARGUMENTS = [
    "--config=configs/quickstart.py",
    "--config.model.name=dit_ln",  # the fastest to trace
    "--config.data.semantics=class",
    "--config.model.unroll=1",
    "--config.log.every=1",
    "--config.checkpoint.every=1",  # a checkpoint is being written nearly always
    "--config.log.samples_every=0",
    "--config.sampling.n=2",
    "--config.sampling.steps=2",
    "--config.evaluation.metrics=()",
]
# Number of kills before the first step (mostly compiling), while a checkpoint is written, and at a
# random time within some steps.
MOMENTS = {"start": 6, "write": 8, "step": 6}


def start(folder, cache, steps=100_000):
    # Compiled programs are cached between the runs, so that only the first one compiles.
    cached = {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    arguments = [*ARGUMENTS, f"--workdir={folder}", f"--config.steps={steps}"]
    return Children(arguments, folder.with_suffix(".log"), **cached)


def reached(folder):
    """Step of the newest complete checkpoint, 0 if there is none."""
    names = [path.name for path in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def until(condition, run):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline and run.processes[0].is_alive(), run.outputs()
        time.sleep(0.002)


def kill(moment, folder, run, rng, seconds):
    """Wait for the moment and kill; returns whether a checkpoint was incomplete."""
    torn = lambda: any(folder.glob("checkpoints/*tmp*"))  # noqa: E731
    if moment == "start":
        time.sleep(rng.uniform(0, seconds))
    else:
        before = reached(folder)
        until(lambda: reached(folder) > before, run)  # the run has resumed
        if moment == "write":
            until(torn, run)
        time.sleep(rng.uniform(0, 0.02 if moment == "write" else 1))
    run.processes[0].kill()
    assert run.wait(30) == [-9], run.outputs()
    return torn()


@pytest.mark.parametrize(
    "counts",
    [dict.fromkeys(MOMENTS, 1), pytest.param(MOMENTS, marks=pytest.mark.slow)],
    ids=["3", "20"],
)
def test_kills_change_nothing(tmp_path, counts):
    rng, folder, cache = random.Random(0), tmp_path / "killed", tmp_path / "cache"
    first, *rest = (moment for moment, count in counts.items() for _ in range(count))
    moments = [first, *rng.sample(rest, len(rest))]  # the first one compiles
    with start(tmp_path / "first", tmp_path / "no") as run:
        begun = time.time()
        until(lambda: reached(tmp_path / "first"), run)
        seconds = time.time() - begun
    torn = 0
    for moment in moments:
        with start(folder, cache) as run:
            torn += kill(moment, folder, run, rng, seconds)
    # Not all kills while writing leave an incomplete checkpoint: writing may end just before.
    assert torn >= counts["write"] // 2
    last = reached(folder) + 2
    states, curves = [], []
    for path in (folder, tmp_path / "whole"):
        with start(path, cache, last) as run:
            assert run.wait(240) == [0], run.outputs()
        config = Workdir(str(path)).load_config()
        checkpoints = Checkpoints(Workdir(str(path)).checkpoints, config)
        assert checkpoints.latest == last
        with tiny.few_layers():
            states.append(checkpoints.restore(tiny.objective(config), sharding.local_mesh()))
        lines = [json.loads(line) for line in (path / "metrics.jsonl").open()]
        curves.append([(line["step"], line["loss"], line["grad_norm"]) for line in lines])
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_array_equal(a, b)
    assert curves[0] == curves[1] and [step for step, *_ in curves[0]] == list(range(1, last + 1))
    assert not list(folder.glob("checkpoints/*tmp*"))  # incomplete checkpoints are deleted
