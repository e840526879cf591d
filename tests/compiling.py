"""Settings for tests: programs run for a moment, tracing and compiling them takes the time."""

import gc

QUICK = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def collect_rarely() -> None:
    """Let Python's garbage collector look at what is loaded never again, and at new objects rarely.

    Tracing makes millions of them, nearly all in no cycle: it takes a sixth less time so.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 20)
