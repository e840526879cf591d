"""How pictures answer to size control: the same noise and prompt, another original's size.

The paper measures LPIPS between pictures of the same seed, prompt and noise but of different sizes,
in pairs, averaged over 10k prompts (Sec. 3.1): over all sizes ("LPIPS" of Table 2a) and over those
from the resolution up ("LPIPS/HR"), which the model should treat alike. The text speaks of ten
generations, the table of five sizes: those make ten pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from condiff_jax.evaluation.metrics.prompt import sharpness

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pixel_distance(images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
    """Root-mean-square difference (N,) of pictures uint8 (N, H, W, 3), with pixels in 0..1."""
    difference = (images1.astype(np.float64) - images2) / 255
    return np.sqrt(np.square(difference).mean((1, 2, 3)))


def size_distance(pictures: np.ndarray, distance: Distance = pixel_distance) -> float:
    """Mean distance over all pairs of the S sizes of pictures (P, S, H, W, 3), over P prompts.

    0 where the size changes nothing. ValueError for fewer than two sizes.
    """
    pairs = list(itertools.combinations(range(pictures.shape[1]), 2))
    if not pairs:
        raise ValueError(f"size_distance needs two sizes or more, got {pictures.shape[1]}")
    return float(np.mean([distance(pictures[:, i], pictures[:, j]) for i, j in pairs]))


def sharpness_by_size(pictures: np.ndarray) -> np.ndarray:
    """Mean sharpness (S,) of pictures (P, S, H, W, 3), in grey levels; see `prompt.sharpness`."""
    return np.mean([[sharpness(image) for image in row] for row in pictures], axis=0)


def log_slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log size, both (S,): 0 is no response.

    A value of 0, a picture without any contrast, counts as 1e-6.
    """
    values = np.maximum(values, 1e-6)
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def size_response(
    pictures: np.ndarray, sizes: Sequence[int], resolution: int, lpips: Distance | None = None
) -> dict[str, float | None]:
    """Measures of pictures uint8 (P, S, H, W, 3) with size control `sizes` (S,), in pixels.

    size_l2 and size_l2_hr: `size_distance` over all sizes, and over those from the resolution up
    (None for fewer than two of them); size_lpips and size_lpips_hr: the same with LPIPS, where it
    is given. sharpness_SIZE, and sharpness_response: the slope of its log over that of the size.
    ValueError for pictures and sizes that do not fit.
    """
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 5 or pictures.shape[1] != len(sizes):
        raise ValueError(
            f"pictures must be uint8 (P, {len(sizes)}, H, W, 3), "
            f"got {pictures.dtype} {pictures.shape}"
        )
    high = [i for i, size in enumerate(sizes) if size >= resolution]
    out = {}
    for name, distance in {"l2": pixel_distance, "lpips": lpips}.items():
        if distance is not None:
            out[f"size_{name}"] = size_distance(pictures, distance)
            enough = len(high) >= 2
            out[f"size_{name}_hr"] = size_distance(pictures[:, high], distance) if enough else None
    values = sharpness_by_size(pictures)
    out |= {f"sharpness_{size}": float(value) for size, value in zip(sizes, values, strict=True)}
    return out | {"sharpness_response": log_slope(sizes, values)}


def mean_response(
    parts: Sequence[tuple[int, dict[str, float | None]]], sizes: Sequence[int]
) -> dict[str, float | None]:
    """The `size_response` of all prompts from (number of prompts, that of each part)."""
    counts, values = zip(*parts, strict=True)
    out = {
        name: None if one is None else float(np.average([v[name] for v in values], 0, counts))
        for name, one in values[0].items()
    }
    sharpnesses = [out[f"sharpness_{size}"] for size in sizes]
    return out | {"sharpness_response": log_slope(sizes, sharpnesses)}
