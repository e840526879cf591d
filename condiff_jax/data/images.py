"""Encoded pictures: decoding to upright RGB, and what is wrong with those that do not decode."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap the sides


def decode(data: bytes) -> np.ndarray:
    """A PNG, JPEG or WebP file's upright picture, over white where transparent: (H, W, 3) uint8."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):
            # Pillow clips 16-bit grey to 255 on conversion; keep its high byte instead.
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=-1)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def lies(data: bytes) -> bool:
    """Whether the file's EXIF orientation swaps height and width of a picture that decodes."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.getexif().get(ORIENTATION) in LYING


def fault(error: Exception) -> str:
    """The kind of what `decode` raised, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return "damaged image"
