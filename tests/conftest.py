"""Eight fake CPU devices and quick compiling for all tests: set before JAX is imported."""

import os

from absl import flags

from tests.compiling import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK}"
)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
