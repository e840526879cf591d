"""Runs: work directory, checkpoints, training state, optimizer; `load` reads a trained run."""

from condiff_jax.runs.run import Run, load

__all__ = ["Run", "load"]
