"""What the processes of `tests.children` have imported when they begin; nothing here starts JAX."""

from condiff_jax import encode, evaluate, fidelity, main, prepare, sample, summary, train
from condiff_jax.convert import exporting, importing
from tests import tiny

__all__ = [
    "encode", "evaluate", "exporting", "fidelity", "importing", "main", "prepare", "sample",
    "summary", "tiny", "train",
]  # fmt: skip
