"""Response to size control: how images with the same noise and prompt differ between sizes.

The paper measures LPIPS between pairs of images of the same seed, prompt and noise but different
size control, averaged over 10k prompts (Sec. 3.1): over all sizes ("LPIPS" in Table 2a) and over
sizes not below the resolution ("LPIPS/HR"), which the model should treat alike. The text mentions
ten generations, the table five sizes: these make ten pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from condiff_jax.evaluation.metrics.prompt import sharpness

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pixel_distance(images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
    """Compute the RMS difference (N,) of images uint8 (N, H, W, 3), scaled to 0..1."""
    difference = (images1.astype(np.float64) - images2) / 255
    return np.sqrt(np.square(difference).mean((1, 2, 3)))


def size_distance(images: np.ndarray, distance: Distance = pixel_distance) -> float:
    """Compute the mean distance over all pairs of sizes and P prompts of images (P, S, H, W, 3).

    0 where the size has no effect. ValueError for fewer than two sizes.
    """
    pairs = list(itertools.combinations(range(images.shape[1]), 2))
    if not pairs:
        raise ValueError(f"size_distance needs two sizes or more, got {images.shape[1]}")
    return float(np.mean([distance(images[:, i], images[:, j]) for i, j in pairs]))


def sharpness_by_size(images: np.ndarray) -> np.ndarray:
    """Compute the mean sharpness (S,) of images (P, S, H, W, 3); see `prompt.sharpness`."""
    return np.mean([[sharpness(image) for image in row] for row in images], axis=0)


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Fit the least-squares slope of log value over log size, both (S,); 0 is no response.

    A value of 0, of images without contrast, counts as 1e-6.
    """
    values = np.maximum(values, 1e-6)
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def size_response(
    images: np.ndarray, sizes: Sequence[int], resolution: int, lpips: Distance | None = None
) -> dict[str, float | None]:
    """Measure images uint8 (P, S, H, W, 3) sampled with size control `sizes` (S,), in pixels.

    size_l2 and size_l2_hr: `size_distance` over all sizes, and over sizes not below the resolution
    (None for fewer than two of them); size_lpips and size_lpips_hr: the same with LPIPS, if given.
    sharpness_SIZE; sharpness_response: the slope of log sharpness over log size. ValueError for
    images and sizes that do not fit.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 5 or images.shape[1] != len(sizes):
        raise ValueError(
            f"images must be uint8 (P, {len(sizes)}, H, W, 3), got {images.dtype} {images.shape}"
        )
    high = [i for i, size in enumerate(sizes) if size >= resolution]
    metrics = {}
    for name, distance in {"l2": pixel_distance, "lpips": lpips}.items():
        if distance is not None:
            metrics[f"size_{name}"] = size_distance(images, distance)
            enough = len(high) >= 2
            metrics[f"size_{name}_hr"] = (
                size_distance(images[:, high], distance) if enough else None
            )
    values = sharpness_by_size(images)
    for size, value in zip(sizes, values, strict=True):
        metrics[f"sharpness_{size}"] = float(value)
    return metrics | {"sharpness_response": log_slope(sizes, values)}


def mean_response(
    parts: Sequence[tuple[int, dict[str, float | None]]], sizes: Sequence[int]
) -> dict[str, float | None]:
    """Combine parts (number of prompts, their `size_response`) into that of all prompts."""
    counts, responses = zip(*parts, strict=True)
    metrics = {
        name: None
        if value is None
        else float(np.average([response[name] for response in responses], 0, counts))
        for name, value in responses[0].items()
    }
    sharpnesses = [metrics[f"sharpness_{size}"] for size in sizes]
    return metrics | {"sharpness_response": log_slope(sizes, sharpnesses)}
