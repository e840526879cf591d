"""Eight fake CPU devices and quick compiling for all tests: set before JAX is imported."""

import os

import pytest
from absl import flags

from condiff_jax import startup
from tests.compiling import QUICK

startup.compile_only()
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK}"
)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A process that trains rows of tables, see rows.py."""
    from tests import rows  # not before the flags above are set: it imports JAX

    process = rows.Trainer(tmp_path_factory.mktemp("rows"))
    yield process
    process.close()
