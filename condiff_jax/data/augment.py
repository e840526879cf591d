"""Crop, flip, color and resize images, and compute the control metadata of what was done."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
from PIL import Image

from condiff_jax.conditioning.control import SCALARS, View, scalar_names
from condiff_jax.data.images import Encoded
from condiff_jax.data.resize import resize

# Ranges of the crop's side, as a fraction of the image's short side.
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of R, G and B, ITU-R BT.601


def augment(
    image: np.ndarray | Encoded,
    rng: np.random.Generator,
    *,
    resolution: int,
    crop: tuple[float, float] = CROPS["global"],
    flip: bool = True,
    color: float = 0.0,
    original: tuple[int, int] | None = None,
) -> tuple[np.ndarray, dict[str, np.float32]]:
    """Crop a random square of uint8 (H, W, 3), maybe mirror it: uint8 (R, R, 3), control scalars.

    Of an encoded image no more is decoded than is needed, with the same scalars. color: the
    strength of a color jitter, see `jitter`. original: height and width in pixels before the image
    was made smaller, if it was. ValueError for a crop range outside 0 < low <= high <= 1, a bad
    resolution or a bad image.
    """
    low, high = crop
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop={crop}: give fractions with 0 < low <= high <= 1")
    height, width = _size(image)
    side = max(1, round(rng.uniform(low, high) * min(height, width)))
    top = int(rng.integers(height - side + 1))
    left = int(rng.integers(width - side + 1))
    # Drawn after the crop, so that turning flips off leaves the crop of a seed as it is.
    mirrored = flip and rng.random() < 0.5
    view = _view(_window(image, top, left, side, resolution), top, left, side, height, width)
    if original is not None:
        view = dataclasses.replace(view, height=original[0], width=original[1])
    if color:  # drawn last, for the same reason
        view = jitter(view, *rng.uniform(1 - color, 1 + color, 3))
    out, scalars = view.image, control_scalars(view, jitter=bool(color))
    return mirror(out, scalars) if mirrored else (out, scalars)


def control_scalars(view: View, *, jitter: bool = False) -> dict[str, np.float32]:
    """The control metadata of a view; jitter: whether images have a color jitter."""
    return {name: np.float32(SCALARS[name].value(view)) for name in scalar_names(jitter)}


def jitter(view: View, brightness: float, contrast: float, saturation: float) -> View:
    """Change the colors of a view's image by three factors, one after the other.

    The factors are those of torchvision's ColorJitter: brightness scales all values, contrast their
    distance from the mean gray of the image, saturation that from the gray of the pixel. Values are
    clipped once, at the end.
    """
    image = view.image.astype(np.float32) * np.float32(brightness)
    gray = (image @ LUMA).mean()
    image = gray + np.float32(contrast) * (image - gray)
    gray = (image @ LUMA)[..., None]
    image = gray + np.float32(saturation) * (image - gray)
    return dataclasses.replace(
        view,
        image=image.round().clip(0, 255).astype(np.uint8),
        brightness=float(brightness),
        contrast=float(contrast),
        saturation=float(saturation),
    )


def mirror(image: np.ndarray, scalars: dict) -> tuple[np.ndarray, dict[str, np.float32]]:
    """Flip an image (H, W, 3) that was not flipped, and its scalars."""
    return cv2.flip(image, 1), scalars | {"flip": np.float32(1)}


def center(image: np.ndarray, resolution: int) -> np.ndarray:
    """The largest centered square of uint8 (H, W, 3), resized to uint8 (R, R, 3)."""
    height, width = _size(image)
    top, left, side = _centered(height, width)
    if resolution < 1:
        raise ValueError(f"resolution={resolution}: it must be at least 1 pixel")
    # Images that others are compared with are resized by Pillow itself, as for published figures.
    window = Image.fromarray(image[top : top + side, left : left + side])
    out = window.resize((resolution,) * 2, Image.Resampling.BICUBIC, reducing_gap=3.0)
    return np.array(out)


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


def _view(image: np.ndarray, top: int, left: int, side: int, height: int, width: int) -> View:
    return View(
        image,
        top=top / height,
        left=left / width,
        rows=side / height,
        columns=side / width,
        flip=False,
        height=height,
        width=width,
    )
