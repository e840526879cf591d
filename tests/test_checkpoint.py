"""Checkpoints on disk: what was torn is never a step, and goes when the run goes on."""

import time

import pytest

from condiff_jax.checkpoint import Checkpoints
from condiff_jax.config import ConfigError
from condiff_jax.workdir import Workdir
from tests import tiny


def test_only_a_run_that_goes_on_clears_what_was_torn(tmp_path):
    """Another one that reads may meet the run while it is writing."""
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
    deadline = time.time() + 10  # it is done beside what follows
    while torn.exists():
        assert time.time() < deadline
        time.sleep(0.01)
