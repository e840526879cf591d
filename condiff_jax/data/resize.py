"""Resizing with antialiasing: Pillow's bicubic within rounding, several times as fast."""

import functools
import math

import cv2
import numpy as np
from PIL import Image

cv2.setNumThreads(0)  # grain's threads and processes share the cores already
GAP = 3  # what is larger than this many times its new size is averaged over whole pixels first


def resize(pixels: np.ndarray, box: tuple[float, float, float], size: int) -> np.ndarray:
    """The square (left, top, side) of uint8 (H, W, 3), in pixels, as uint8 (size, size, 3).

    Pixels that the square does not touch do not matter.
    """
    left, top, side = box
    rows, columns = (slice(math.floor(a), math.ceil(a + side)) for a in (top, left))
    pixels, left, top = pixels[rows, columns], left % 1, top % 1
    scale = side / size
    if scale >= 2 * GAP:
        factor = int(scale / GAP)
        pixels = np.asarray(Image.fromarray(pixels).reduce(factor))
        left, top, scale = left / factor, top / factor, scale / factor
    if scale > 1 or left or top:
        # OpenCV's cubic does not antialias. It interpolates between what Pillow's kernel, centred
        # on the square's first pixel, gives at each pixel.
        x, y = (_kernel(max(scale, 1), shift) for shift in (left, top))
        pixels = cv2.sepFilter2D(pixels, -1, x, y, borderType=cv2.BORDER_REPLICATE)
    if scale == 1:
        return pixels[:size, :size]
    # By its factors, as the number of pixels is the side rounded up.
    out = cv2.resize(pixels, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_CUBIC)
    return out[:size, :size]


@functools.lru_cache(4096)
def _kernel(scale: float, shift: float) -> np.ndarray:
    """Keys's cubic, a = -1/2, `scale` times as wide, about `shift`: the weights of whole pixels."""
    reach = math.ceil(2 * scale + shift) - 1
    distances = [abs(x - shift) / scale for x in range(-reach, reach + 1)]
    weights = [cubic(distance) for distance in distances]
    return np.array(weights) / sum(weights)


def cubic(d: float) -> float:
    """Keys's cubic, a = -1/2, at a distance in pixels."""
    return 1 - (2.5 - 1.5 * d) * d * d if d < 1 else max(2 - d, 0) * (d - 1) * (d - 2) / 2
