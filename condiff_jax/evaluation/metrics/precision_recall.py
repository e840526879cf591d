"""Improved precision and recall (arXiv:1904.06991) of generated and reference features."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.evaluation.metrics.features import check_features

NEIGHBORS = 3  # of the paper and torch-fidelity
BLOCK = 1024  # rows of the distance matrix in memory at a time


def precision_recall(
    generated: np.ndarray, reference: np.ndarray, neighbors: int = NEIGHBORS
) -> dict[str, float]:
    """Compute precision and recall of features (N, D) and (M, D) from the distances of all pairs.

    The ball around a feature reaches its `neighbors`-th nearest neighbor in the same set.
    precision: share of generated features in any ball of the reference; recall: the reverse. Both
    depend on N and M. ValueError for no more features than neighbors.
    """
    generated, reference = check_features(generated, reference)
    if min(len(generated), len(reference)) <= neighbors:
        raise ValueError(
            f"precision and recall need more than {neighbors} images each, "
            f"got {len(generated)} and {len(reference)}"
        )
    # Squared distances are differences of squares, which round less near the origin.
    origin = reference.mean(0, dtype=np.float64)
    x, y = (jnp.asarray(a - origin, jnp.float32) for a in (generated, reference))
    return {
        "precision": _inside(x, y, _radii(y, neighbors)),
        "recall": _inside(y, x, _radii(x, neighbors)),
    }


def _inside(points: jax.Array, centers: jax.Array, radii: jax.Array) -> float:
    """Compute the share of points (N, D) in any ball at centers (M, D) with squared radii (M,)."""
    parts = [np.asarray(_any_ball(rows, centers, radii)) for rows in _blocks(points)]
    return float(np.concatenate(parts).mean())


def _radii(points: jax.Array, neighbors: int) -> jax.Array:
    """Compute squared distances (N,) of points (N, D) to their `neighbors`-th nearest neighbor."""
    return jnp.concatenate([_nearest(rows, points, neighbors) for rows in _blocks(points)])


def _blocks(points: jax.Array) -> list[jax.Array]:
    return [points[i : i + BLOCK] for i in range(0, len(points), BLOCK)]


@jax.jit
def _any_ball(rows: jax.Array, centers: jax.Array, radii: jax.Array) -> jax.Array:
    return (_squares(rows, centers) <= radii).any(1)


@partial(jax.jit, static_argnums=2)
def _nearest(rows: jax.Array, points: jax.Array, neighbors: int) -> jax.Array:
    # The nearest of all is the row itself, at distance 0 up to rounding.
    return -jax.lax.top_k(-_squares(rows, points), neighbors + 1)[0][:, -1]


def _squares(x: jax.Array, y: jax.Array) -> jax.Array:
    products = jnp.matmul(x, y.T, precision="highest")
    return jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1) - 2 * products
