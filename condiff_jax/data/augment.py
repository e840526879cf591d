"""Crops, flips and resizes pictures, and says what was done: the model's control metadata."""

import cv2
import numpy as np
from PIL import Image

from condiff_jax.data.images import Encoded
from condiff_jax.data.resize import resize

SCALARS = (
    "crop_top",
    "crop_left",
    "crop_height",
    "crop_width",
    "flip",
    "aspect",
    "height",
    "width",
)
# Ranges of the crop's side, as a fraction of the picture's short side.
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}


def augment(
    image: np.ndarray | Encoded,
    rng: np.random.Generator,
    *,
    resolution: int,
    crop: tuple[float, float] = CROPS["global"],
    flip: bool = True,
    original: tuple[int, int] | None = None,
) -> tuple[np.ndarray, dict[str, np.float32]]:
    """A random square crop of uint8 (H, W, 3), maybe mirrored: uint8 (R, R, 3) and its SCALARS.

    Of an encoded picture no more is decoded than is needed, with the same SCALARS.
    original: height and width in pixels before the picture was made smaller, if it was.
    ValueError for a crop range outside 0 < low <= high <= 1, a bad resolution or a bad image.
    """
    low, high = crop
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop={crop}: give fractions with 0 < low <= high <= 1")
    height, width = _size(image)
    side = max(1, round(rng.uniform(low, high) * min(height, width)))
    top = int(rng.integers(height - side + 1))
    left = int(rng.integers(width - side + 1))
    # Drawn last, so that turning flips off leaves the crop of a given seed as it was.
    mirrored = flip and rng.random() < 0.5
    out = _window(image, top, left, side, resolution)
    scalars = _scalars(top, left, side, False, height, width)
    if original is not None:
        known = zip(("aspect", "height", "width"), _frame(*original), strict=True)
        scalars |= {name: np.float32(value) for name, value in known}
    return mirror(out, scalars) if mirrored else (out, scalars)


def mirror(image: np.ndarray, scalars: dict) -> tuple[np.ndarray, dict[str, np.float32]]:
    """A picture (H, W, 3) that was not flipped, flipped, and its SCALARS."""
    return cv2.flip(image, 1), scalars | {"flip": np.float32(1)}


def center(image: np.ndarray, resolution: int) -> tuple[np.ndarray, dict[str, np.float32]]:
    """The largest centred square of uint8 (H, W, 3): uint8 (R, R, 3) and its SCALARS."""
    height, width = _size(image)
    top, left, side = _centered(height, width)
    if resolution < 1:
        raise ValueError(f"resolution={resolution}: it must be at least 1 pixel")
    # What pictures are measured against is resized by Pillow itself, as for published figures.
    window = Image.fromarray(image[top : top + side, left : left + side])
    out = window.resize((resolution,) * 2, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(out), _scalars(top, left, side, False, height, width)


def full_frame(height: int, width: int) -> dict[str, np.float32]:
    """The SCALARS of `center` for a picture of that many pixels: what to ask of a sampler."""
    if min(height, width) < 1:
        raise ValueError(f"height={height}, width={width}: both must be at least 1 pixel")
    top, left, side = _centered(height, width)
    return _scalars(top, left, side, False, height, width)


def _centered(height: int, width: int) -> tuple[int, int, int]:
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side


def _size(image: np.ndarray | Encoded) -> tuple[int, int]:
    if isinstance(image, Encoded):
        return image.height, image.width
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image is {image.dtype} {image.shape}; it must be uint8 (H, W, 3)")
    return image.shape[:2]


def _window(
    image: np.ndarray | Encoded, top: int, left: int, side: int, resolution: int
) -> np.ndarray:
    if resolution < 1:
        raise ValueError(f"resolution={resolution}: it must be at least 1 pixel")
    if isinstance(image, Encoded):
        return image.window(top, left, side, resolution)
    return resize(image, (left, top, side), resolution)


def _scalars(
    top: int, left: int, side: int, flip: bool, height: int, width: int
) -> dict[str, np.float32]:
    """Crop as fractions of the picture, flip as 0 or 1, aspect as W / H, sizes in pixels."""
    values = (
        top / height,
        left / width,
        side / height,
        side / width,
        flip,
        *_frame(height, width),
    )
    return {name: np.float32(value) for name, value in zip(SCALARS, values, strict=True)}


def _frame(height: int, width: int) -> tuple[float, int, int]:
    """aspect, height and width of the SCALARS."""
    return width / height, height, width
