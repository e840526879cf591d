"""Eight fake CPU devices and quick compiling for all tests: set before JAX is imported."""

import os
import tempfile

import pytest
from absl import flags

from condiff_jax.runtime.process import compile_only
from tests.compiling import QUICK, collect_rarely

compile_only()
# Tests, and the processes that they start, have programs in common. pytest's workers inherit this.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's threads wait busily for one another
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK}"
)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags


def pytest_configure(config):
    """Measure what the files cost."""
    from tests.cpu_report import CpuReport  # not before the flags above are set: it imports JAX

    config.pluginmanager.register(CpuReport())


# Files that take long, most of it for one of pytest's workers to wait for processes or programs.
FIRST = (
    "test_distributed", "test_stopping", "test_torture", "test_rows", "test_loop", "test_plan",
    "test_transformers", "test_transfer", "test_mmdit", "test_classifier_guide", "test_exporting",
    "test_importing", "test_encode", "test_parity",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Begin with what takes long, so that the workers end together."""
    items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish():
    """Everything is imported."""
    collect_rarely()


@pytest.fixture
def emoji(tmp_path, monkeypatch):
    """A folder `emoji` of pictures, in the one that the test runs in."""
    from tests import rows

    rows.write_images(tmp_path / "emoji")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A process that trains rows of tables, see rows.py."""
    from tests import rows  # not before the flags above are set: it imports JAX

    process = rows.Trainer(tmp_path_factory.mktemp("rows"))
    yield process
    process.close()
