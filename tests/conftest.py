"""Eight fake CPU devices for all tests: set before JAX is imported anywhere."""

import os

from absl import flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
