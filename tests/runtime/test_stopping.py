"""SIGTERM to the whole process group, as job managers send it, while the data loader hangs.

Its worker processes read a limited number of images, and then hang as on a broken disk.
"""

import contextlib
import gc
import json
import os
import signal
import time
import weakref

import jax
import numpy as np
import pytest
from etils import epath

from condiff_jax.models import kl
from condiff_jax.runtime.distributed import Interrupt
from condiff_jax.runtime.process import STOPPED_MESSAGE, WORKER_TIMEOUT, Stopped, stoppable
from condiff_jax.training.reporters import autoencoder
from tests import tiny
from tests.children import Children
from tests.data.test_webdataset import samples, write_tar

# A sitecustomize.py: only interpreters that a run starts (its workers) load it.
HANGING_DISK = """
import os, time
left, read = int(os.environ["READS"]), os.pread
def pread(*arguments):
    global left
    left -= 1
    while left < 0:
        time.sleep(0.1)
    return read(*arguments)
os.pread = pread
"""
BATCH = 4


@pytest.fixture
def start(tmp_path):
    """Return a function (*arguments, reads=None) that runs a command with two loader workers."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "sitecustomize.py").write_text(HANGING_DISK)
    (tmp_path / "data").mkdir()
    write_tar(tmp_path / "data" / "0.tar", samples(range(16)))
    arguments = [
        "--config=configs/quickstart.py",
        "--config.model.unroll=1",
        "--config.data.name=webdataset",
        f"--config.data.path={tmp_path / 'data'}",
        "--config.data.workers=2",
        f"--config.batch_size={BATCH}",
        "--config.log.every=1",
        "--config.sampling.n=2",
        "--config.sampling.steps=2",
        "--config.evaluation.metrics=()",
    ]

    def start(*more, reads=None):
        environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        if reads is not None:
            environment |= {"PYTHONPATH": str(tmp_path / "disk"), "READS": str(reads)}
        return Children([*arguments, *more], tmp_path / "log", **environment)

    return start


def wait_for(condition, run):
    deadline = time.time() + 120
    while not condition():
        assert time.time() < deadline and run.processes[0].is_alive(), run.outputs()
        time.sleep(0.05)


def stop(run, seconds=10):
    """Send SIGTERM to the process group of a run, assert a clean end, and return the output."""
    sent = time.time()
    os.killpg(run.processes[0].pid, signal.SIGTERM)
    assert run.wait(60) == [0], run.outputs()
    assert time.time() - sent < seconds, run.outputs()
    while run.group():
        assert time.time() - sent < seconds + 5, run.group()
        time.sleep(0.05)
    (output,) = run.outputs()
    assert "Traceback" not in output and "rror" not in output
    return output


def test_training_saves_a_checkpoint_and_the_same_command_resumes(start, tmp_path):
    folder = tmp_path / "run"
    metrics = folder / "metrics.jsonl"
    arguments = f"--workdir={folder}", "--config.checkpoint.every=100000"
    steps = lambda: metrics.read_text().count("\n") if metrics.exists() else 0  # noqa: E731
    with start(*arguments, "--config.steps=100000", reads=6 * BATCH * 2) as run:  # and captions
        wait_for(lambda: steps() >= 6, run)
        time.sleep(1)  # until it waits for the next batch
        stopped = steps()
        assert f"Stopped at step {stopped}; the same command" in stop(run)
    assert (folder / "checkpoints" / str(stopped)).is_dir()
    with start(*arguments, f"--config.steps={stopped + 1}") as run:
        assert run.wait(120) == [0] and not run.group(), run.outputs()
    assert [json.loads(line)["step"] for line in metrics.open()] == list(range(1, stopped + 2))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reference", "evaluate"])
def test_stopping_while_a_reference_is_read(start, tmp_path, mode):
    out, folder = tmp_path / "statistics.npz", tmp_path / "run"
    arguments = [f"--mode={mode}", "--config.evaluation.inception=random"]
    if mode == "reference":
        arguments += [f"--config.evaluation.statistics={out}"]
    else:
        with start(f"--workdir={folder}", "--config.steps=1") as run:
            assert run.wait(120) == [0], run.outputs()
        arguments += [f"--workdir={folder}", "--config.steps=1"]
        arguments += ["--config.evaluation.metrics=('fid',)", "--config.evaluation.samples=4"]
    with start(*arguments, reads=4) as run:
        wait_for(lambda: len(run.group()) == 3, run)
        time.sleep(3)
        assert STOPPED_MESSAGE in stop(run)
    assert not out.exists() and not (folder / "evaluation.jsonl").exists()


def test_stopping_while_latents_are_encoded(start, tmp_path):
    network = kl.AutoencoderKL(kl.SIZES["tiny"])
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    params = tiny.random_params(shapes)
    autoencoder.export(network, params, epath.Path(tmp_path / "autoencoder"))
    arguments = [
        "--mode=encode",
        "--config.autoencoder.name=kl",
        "--config.autoencoder.size=tiny",
        f"--config.autoencoder.path={tmp_path / 'autoencoder'}",
        f"--config.encode.path={tmp_path / 'out'}",
        "--config.encode.shard_mb=20",
    ]
    with start(*arguments, reads=10) as run:
        wait_for(lambda: len(run.group()) == 3 and "encode" in run.outputs()[0], run)
        time.sleep(3)
        assert STOPPED_MESSAGE in stop(run)
    with start(*arguments) as run:
        assert run.wait(120) == [0], run.outputs()
    assert (tmp_path / "out" / "manifest.json").exists()


def test_workers_end_with_a_parent_that_is_killed(start, tmp_path):
    with start(f"--workdir={tmp_path / 'run'}", "--config.steps=100000", reads=0) as run:
        wait_for(lambda: len(run.group()) == 3, run)
        time.sleep(3)
        run.processes[0].kill()
        deadline = time.time() + 10
        while run.group():
            assert time.time() < deadline
            time.sleep(0.05)


@pytest.fixture
def at_collection():
    """Send SIGTERM during the next garbage collection, in whose callbacks Python drops errors."""
    sent = []

    def callback(phase, info):
        if not sent:
            sent.append(phase)
            signal.raise_signal(signal.SIGTERM)

    gc.callbacks.append(callback)
    yield
    gc.callbacks.remove(callback)
    signal.alarm(0)


def wait_after_collection():
    gc.collect()
    time.sleep(1)
    pytest.fail("continues after SIGTERM")


def test_sigterm_during_a_garbage_collection_is_not_lost(at_collection, capsys):
    with stoppable():
        wait_after_collection()
    assert STOPPED_MESSAGE in capsys.readouterr().out


class Resource:
    """An object that sends SIGTERM when it is deleted."""

    def __del__(self):
        signal.raise_signal(signal.SIGTERM)


class Finalized:
    """An object whose finalizer sends SIGTERM."""

    def __init__(self):
        weakref.finalize(self, signal.raise_signal, signal.SIGTERM)


@pytest.mark.parametrize("kind", [Resource, Finalized])
def test_sigterm_while_an_object_is_deleted_is_not_lost(kind, capsys):
    with stoppable():
        kind()
        time.sleep(1)
        pytest.fail("continues after SIGTERM")
    assert STOPPED_MESSAGE in capsys.readouterr().out


def test_sigterm_is_not_lost_where_training_waits_for_a_batch(at_collection):
    with Interrupt() as interrupt:
        with contextlib.suppress(Stopped), interrupt.immediate():
            wait_after_collection()
        assert interrupt.requested


def test_the_alarm_that_ends_workers_outlives_a_command_that_has_saved():
    """Training ends cleanly after SIGTERM; its workers may still hang then."""
    try:
        with stoppable(), Interrupt():
            signal.raise_signal(signal.SIGTERM)
        assert 0 < signal.alarm(0) <= WORKER_TIMEOUT
    finally:
        signal.alarm(0)
