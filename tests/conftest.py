"""Eight fake CPU devices for all tests, and quick compiling: set before JAX is imported anywhere."""

import os

from absl import flags

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run for a moment, so compiling them takes most of the time.
QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false"
)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {QUICK}"
)
flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
