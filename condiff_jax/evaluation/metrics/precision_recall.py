"""Improved precision and recall (arXiv:1904.06991): features inside each other's balls."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.evaluation.metrics.features import check_features

NEIGHBOURS = 3  # the paper's and torch-fidelity's
BLOCK = 1024  # rows of distances at a time


def precision_recall(
    generated: np.ndarray, reference: np.ndarray, neighbours: int = NEIGHBOURS
) -> dict[str, float]:
    """precision and recall of features (N, D) and (M, D); every pair is looked at.

    A ball around a feature reaches its `neighbours`-th nearest of the same set; precision: share of
    generated features in any ball of the reference; recall: the reverse. Depends on N and M.
    ValueError for as few features as neighbours.
    """
    generated, reference = check_features(generated, reference)
    if min(len(generated), len(reference)) <= neighbours:
        raise ValueError(
            f"precision and recall need more than {neighbours} pictures each, "
            f"got {len(generated)} and {len(reference)}"
        )
    # Squares of distances are differences, which lose less near the origin.
    origin = reference.mean(0, dtype=np.float64)
    x, y = (jnp.asarray(a - origin, jnp.float32) for a in (generated, reference))
    return {
        "precision": _inside(x, y, _radii(y, neighbours)),
        "recall": _inside(y, x, _radii(x, neighbours)),
    }


def _inside(points: jax.Array, centres: jax.Array, radii: jax.Array) -> float:
    """Share of points (N, D) in any ball around centres (M, D) with squared radii (M,)."""
    parts = [np.asarray(_any_ball(rows, centres, radii)) for rows in _blocks(points)]
    return float(np.concatenate(parts).mean())


def _radii(points: jax.Array, neighbours: int) -> jax.Array:
    """Squared distances (N,) to the nearest neighbours but `neighbours` - 1, itself left out."""
    return jnp.concatenate([_nearest(rows, points, neighbours) for rows in _blocks(points)])


def _blocks(points: jax.Array) -> list[jax.Array]:
    return [points[i : i + BLOCK] for i in range(0, len(points), BLOCK)]


@jax.jit
def _any_ball(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    return (_squares(rows, centres) <= radii).any(1)


@partial(jax.jit, static_argnums=2)
def _nearest(rows: jax.Array, points: jax.Array, neighbours: int) -> jax.Array:
    # Each row is among the points, at distance 0 (less rounding): the nearest of all.
    return -jax.lax.top_k(-_squares(rows, points), neighbours + 1)[0][:, -1]


def _squares(x: jax.Array, y: jax.Array) -> jax.Array:
    products = jnp.matmul(x, y.T, precision="highest")
    return jnp.square(x).sum(1)[:, None] + jnp.square(y).sum(1) - 2 * products
