"""Frechet distance between Gaussians fitted to two sets of features; float64 on the host."""

from __future__ import annotations

import numpy as np


class Moments:
    """Running mean and covariance of batches of features; f64 sums about the first batch's mean."""

    def __init__(self):
        self.count = 0

    def add(self, features: np.ndarray) -> None:
        """Add features (N, D), N > 0; ValueError for NaNs, infinities or another D."""
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or not features.size:
            raise ValueError(f"features must be (N > 0, D), got {features.shape}")
        if not np.isfinite(features).all():
            raise ValueError("features contain NaN or infinity")
        if not self.count:
            # Sums about a point near the mean avoid the cancellation of those about 0.
            self.origin = features.mean(0)
            self.sum = np.zeros_like(self.origin)
            self.products = np.zeros((len(self.origin),) * 2)
        if features.shape[1] != len(self.origin):
            raise ValueError(f"features have {features.shape[1]} dimensions, not {len(self.sum)}")
        offsets = features - self.origin
        self.count += len(features)
        self.sum += offsets.sum(0)
        self.products += offsets.T @ offsets

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean (D,) and unbiased covariance (D, D); ValueError for fewer than 2 samples."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 samples or more, got {self.count}")
        offset = self.sum / self.count
        covariance = self.products - self.count * np.outer(offset, offset)
        return self.origin + offset, covariance / (self.count - 1)


def frechet_distance(
    mean1: np.ndarray, cov1: np.ndarray, mean2: np.ndarray, cov2: np.ndarray
) -> float:
    """Compute the squared 2-Wasserstein distance of two Gaussians.

    |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), with means (D,) and covariances
    (D, D) of any rank. The trace of the root is the sum of the roots of the eigenvalues of
    root(cov1) cov2 root(cov1), which is symmetric: rounding cannot cause complex numbers.
    ValueError for other shapes, NaNs or infinities.
    """
    arrays = [np.asarray(a, np.float64) for a in (mean1, cov1, mean2, cov2)]
    mean1, cov1, mean2, cov2 = arrays
    d = mean1.size
    shapes = [a.shape for a in arrays]
    if shapes != [(d,), (d, d)] * 2:
        raise ValueError(f"dimensions of means and covariances do not match: {shapes}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError("means or covariances contain NaN or infinity")
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    values = np.linalg.eigvalsh(root @ cov2 @ root)
    trace_of_root = np.sqrt(np.maximum(values, 0)).sum()
    distance = np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * trace_of_root
    return float(max(distance, 0.0))  # rounding may give -1e-12
