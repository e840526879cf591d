"""Checkpoints on disk: which ones are kept, and interrupted writes are never steps."""

import time

import jax
import numpy as np
import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.runs.checkpoint import Checkpoints, newest
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from tests import tiny


def test_only_a_resumed_run_deletes_interrupted_writes(tmp_path):
    """A process that only reads must not delete what the run is writing."""
    path = Workdir(tmp_path).checkpoints
    with pytest.raises(ConfigError, match="no checkpoints here"):
        Checkpoints(path, tiny.config())
    torn = path / "7.orbax-checkpoint-tmp"  # of a step that is not saved again
    torn.mkdir(parents=True)
    (torn / "half").touch()
    for create in (False, True):
        assert torn.exists()
        checkpoints = Checkpoints(path, tiny.config(), create=create)
        assert checkpoints.latest is None
        checkpoints.close()
    deadline = time.time() + 10  # deleted in the background
    while torn.exists():
        assert time.time() < deadline
        time.sleep(0.01)


def test_the_newest_and_the_ones_of_lowest_loss_are_kept(tmp_path):
    config = tiny.config(**{"checkpoint.keep": 1, "checkpoint.keep_best": 2})
    path = Workdir(tmp_path).checkpoints
    checkpoints = Checkpoints(path, config, create=True)
    for step, loss in enumerate([3.0, 1.0, 4.0, 2.0, 5.0], 1):
        checkpoints.save(step, {"a": np.zeros(1)}, loss)
        checkpoints.wait()
    checkpoints.close()
    assert sorted(int(folder.name) for folder in path.iterdir()) == [2, 4, 5]


def test_the_newest_checkpoint_is_the_one_of_the_largest_number(tmp_path):
    path = Workdir(tmp_path).checkpoints
    assert newest(path) is None
    for name in ("9", "10", "11.orbax-checkpoint-tmp"):
        (path / name).mkdir(parents=True)
    assert newest(path) == 10


def test_small_arrays_are_saved_without_compiling(tmp_path):
    """Otherwise a program would be compiled for the slice of each device."""
    arrays = {"kernel": np.arange(520.0).reshape(8, 65), "bias": np.arange(24.0)}
    arrays = jax.device_put(arrays, sharding.replicated(sharding.create_mesh(1)))
    checkpoints = Checkpoints(Workdir(tmp_path).checkpoints, tiny.config(), create=True)
    compiled = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpoints.save(1, arrays, 0.0)
        checkpoints.close()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
