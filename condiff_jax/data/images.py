"""Encoded pictures: decoding to upright RGB, and what is wrong with those that do not decode."""

import io
import math

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # EXIF tag, and its values that swap the sides
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
        self.lies = orientation in LYING  # its sides are swapped in the file
        self.height, self.width = image.size if self.lies else image.size[::-1]

    def decode(self) -> np.ndarray:
        """All of it, over white where transparent: (H, W, 3) uint8."""
        return np.array(_rgb(self._upright(self._take())))

    def window(self, top: int, left: int, side: int, least: int):
        """A square of the picture to be resized to `least` pixels a side, maybe decoded smaller.

        An RGB image, and where the square's edges (left, top, right, bottom) lie in it: at the
        image's own, less than a pixel inside where a smaller one has none there.
        """
        image, scale = self._take(), 1
        if not self._turned:  # turning moves the fractions of a pixel at the edges elsewhere
            scale = max(s for s in (1, 2, 4, 8) if s == 1 or side >= s * SPARE * least)
            if image.draft(None, (image.width // scale, image.height // scale)) is None:
                scale = 1  # no JPEG
        edges = [edge / scale for edge in (left, top, left + side, top + side)]
        x, y = math.floor(edges[0]), math.floor(edges[1])
        box = (x, y, math.ceil(edges[2]), math.ceil(edges[3]))
        cut = _rgb(self._upright(image).crop(box))
        return cut, (edges[0] - x, edges[1] - y, edges[2] - x, edges[3] - y)

    def _take(self) -> Image.Image:
        """The opened file, nothing of it decoded at another size."""
        image, self._image = self._image, None
        return image or Image.open(io.BytesIO(self._data), formats=FORMATS)

    def _upright(self, image: Image.Image) -> Image.Image:
        if self._turned:
            ImageOps.exif_transpose(image, in_place=True)
        return image


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


def fault(error: Exception) -> str:
    """The kind of what `decode` raised, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return "damaged image"
