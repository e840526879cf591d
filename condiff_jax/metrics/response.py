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

from condiff_jax.metrics.prompt import sharpness

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


class SizeResponse:
    """`size_response` of prompts that come in parts: only one part's pictures need be held."""

    def __init__(self, sizes: Sequence[int], resolution: int, lpips: Distance | None = None):
        self.sizes, self.count = sizes, 0
        self._sums: dict[str, float] = {}
        self._high = [i for i, size in enumerate(sizes) if size >= resolution]
        self._distances = {"l2": pixel_distance} | ({"lpips": lpips} if lpips else {})

    def add(self, pictures: np.ndarray) -> None:
        """Take in pictures uint8 (P, S, H, W, 3); ValueError for others."""
        pictures, s = np.asarray(pictures), len(self.sizes)
        if (
            pictures.dtype != np.uint8
            or pictures.ndim != 5
            or pictures.shape[1] != s
            or not len(pictures)
        ):
            raise ValueError(
                f"pictures must be uint8 (P, {s}, H, W, 3), got {pictures.dtype} {pictures.shape}"
            )
        values = dict(zip(self._sharpness, sharpness_by_size(pictures), strict=True))
        for name, distance in self._distances.items():
            values[f"size_{name}"] = size_distance(pictures, distance)
            if len(self._high) >= 2:
                values[f"size_{name}_hr"] = size_distance(pictures[:, self._high], distance)
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + len(pictures) * float(value)
        self.count += len(pictures)

    def result(self) -> dict[str, float | None]:
        """The measures of all that was taken in, see `size_response`; ValueError if nothing was."""
        if not self.count:
            raise ValueError("size_response needs a prompt or more")
        out: dict[str, float | None] = {f"size_{name}_hr": None for name in self._distances}
        out |= {name: value / self.count for name, value in self._sums.items()}
        sharpness = [out[name] for name in self._sharpness]
        return out | {"sharpness_response": log_slope(self.sizes, sharpness)}

    @property
    def _sharpness(self) -> list[str]:
        return [f"sharpness_{size}" for size in self.sizes]


def size_response(
    pictures: np.ndarray, sizes: Sequence[int], resolution: int, lpips: Distance | None = None
) -> dict[str, float | None]:
    """Measures of pictures uint8 (P, S, H, W, 3) with size control `sizes` (S,), in pixels.

    size_l2 and size_l2_hr: `size_distance` over all sizes, and over those from the resolution up
    (None for fewer than two of them); size_lpips and size_lpips_hr: the same with LPIPS, where it
    is given. sharpness_SIZE, and sharpness_response: the slope of its log over that of the size.
    ValueError for pictures and sizes that do not fit.
    """
    whole = SizeResponse(sizes, resolution, lpips)
    whole.add(pictures)
    return whole.result()
