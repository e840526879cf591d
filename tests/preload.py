"""What the processes of `tests.children` have imported when they begin; nothing here starts JAX."""

from condiff_jax import main
from condiff_jax.data.builders import prepare
from condiff_jax.evaluation import evaluate
from condiff_jax.objectives import summary
from condiff_jax.pytorch import exporting, importing
from condiff_jax.sampling import sample
from condiff_jax.training import encode
from tests import tiny

__all__ = [
    "encode", "evaluate", "exporting", "importing", "main", "prepare", "sample", "summary", "tiny",
]  # fmt: skip
