"""Encoded pictures: decoding to upright RGB, and what is wrong with those that do not decode."""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from condiff_jax.data.resize import resize

FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION, TRANSPOSED = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap the sides
# A JPEG may be decoded at a half, a quarter or an eighth of its size, which is faster, if a window
# keeps this many times the pixels a side that it is resized to: the difference is that of one good
# filter from another.
SPARE = 4 / 3


class Encoded:
    """A PNG, JPEG or WebP file: its header is read now, its pixels are decoded when asked for.

    height, width: in pixels, of the upright picture. Pillow's errors, now or then, for a bad file.
    """

    def __init__(self, data: bytes):
        self._data, self._image = data, None
        image = self._image = self._take()
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        orientation = image.getexif().get(ORIENTATION, 1)
        self._turned = orientation in range(2, 9)
        self.transposed = orientation in TRANSPOSED  # its sides are swapped in the file
        self.height, self.width = image.size if self.transposed else image.size[::-1]
        # Turning would move the fractions of a pixel at a window's edges elsewhere.
        self._shrinks = isinstance(image, JpegImageFile) and not self._turned

    def decode(self) -> np.ndarray:
        """All of it, over white where transparent: (H, W, 3) uint8."""
        return self._decode(1)

    def window(self, top: int, left: int, side: int, size: int) -> np.ndarray:
        """A square of the picture, in pixels, resized to (size, size, 3) uint8.

        No more is decoded for it than it needs.
        """
        scales = (1, 2, 4, 8) if self._shrinks else (1,)
        scale = max(s for s in scales if s == 1 or side >= s * SPARE * size)
        return resize(self._decode(scale), (left / scale, top / scale, side / scale), size)

    def _decode(self, scale: int) -> np.ndarray:
        """All of it, at a `scale`-th of its size, rounded up."""
        image, (height, width) = self._take(), (self.height, self.width)
        if self._shrinks and image.mode in ("RGB", "L"):
            # The same pixels as Pillow's, faster; what is strictly no JPEG is for Pillow to judge.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(
                    self._data, min_height=-(-height // scale), min_width=-(-width // scale)
                )
        if scale > 1:
            image.draft(None, (width // scale, height // scale))
        if self._turned:
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(_rgb(image))

    def _take(self) -> Image.Image:
        """The opened file, nothing of it decoded at another size."""
        image, self._image = self._image, None
        return image or Image.open(io.BytesIO(self._data), formats=FORMATS)


def decode(data: bytes) -> np.ndarray:
    """A PNG, JPEG or WebP file's upright picture, over white where transparent: (H, W, 3) uint8."""
    return Encoded(data).decode()


def _rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB, over white where transparent."""
    if image.mode.startswith("I"):
        # Pillow clips 16-bit grey to 255 on conversion; keep its high byte instead.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_error(error: Exception) -> str:
    """The kind of what `decode` raised, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return "damaged image"
