"""KID (arXiv:1801.01401): squared maximum mean discrepancy of features, over random subsets."""

from __future__ import annotations

import numpy as np

from condiff_jax.evaluation.metrics.features import check_features

SUBSETS, SIZE, SEED = 100, 1000, 2020  # torch-fidelity's


def kid(
    generated: np.ndarray,
    reference: np.ndarray,
    subsets: int = SUBSETS,
    size: int = SIZE,
    seed: int = SEED,
) -> dict[str, float]:
    """Mean and deviation over subsets of features (N, D) and (M, D): kid and kid_std.

    Unbiased, so it may be less than 0; draws the subsets that torch-fidelity draws. ValueError
    for fewer features than a subset has.
    """
    generated, reference = check_features(generated, reference)
    if subsets < 1 or size < 2 or min(len(generated), len(reference)) < size:
        raise ValueError(
            f"kid needs as many pictures as a subset has, {max(size, 2)}, or more; "
            f"got {len(generated)} and {len(reference)}"
        )
    draw, values = np.random.RandomState(seed), []
    for _ in range(subsets):
        x = generated[draw.choice(len(generated), size, replace=False)].astype(np.float64)
        y = reference[draw.choice(len(reference), size, replace=False)].astype(np.float64)
        values.append(_discrepancy(x, y))
    return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased, of (n, D) and (n, D): pairs of a sample with itself are left out."""
    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
