"""A run and its work directory: training state, checkpoints, files; `load` reads one."""

from condiff_jax.runs.run import Run, load

__all__ = ["Run", "load"]
