"""KID (arXiv:1801.01401): squared maximum mean discrepancy of features, over random subsets."""

from __future__ import annotations

import numpy as np

from condiff_jax.evaluation.metrics.features import check_features

SUBSETS, SIZE, SEED = 100, 1000, 2020  # defaults of torch-fidelity


def kid(
    generated: np.ndarray,
    reference: np.ndarray,
    subsets: int = SUBSETS,
    size: int = SIZE,
    seed: int = SEED,
) -> dict[str, float]:
    """Compute mean and deviation over subsets of features (N, D) and (M, D): kid and kid_std.

    Unbiased, so it may be negative. The subsets are those of torch-fidelity. ValueError for fewer
    features than a subset has.
    """
    generated, reference = check_features(generated, reference)
    if subsets < 1 or size < 2 or min(len(generated), len(reference)) < size:
        raise ValueError(
            f"kid needs as many images as a subset has, {max(size, 2)}, or more; "
            f"got {len(generated)} and {len(reference)}"
        )
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        x = generated[rng.choice(len(generated), size, replace=False)].astype(np.float64)
        y = reference[rng.choice(len(reference), size, replace=False)].astype(np.float64)
        values.append(_discrepancy(x, y))
    return {"kid": float(np.mean(values)), "kid_std": float(np.std(values))}


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the unbiased discrepancy of (n, D) and (n, D), without pairs of equal samples."""
    n = len(x)
    within = sum(k.sum() - np.trace(k) for k in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
