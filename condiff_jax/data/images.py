"""Decoding of image files to upright RGB, and short descriptions of decoding errors."""

import contextlib
import io

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from condiff_jax.data.resize import resize

FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION = 0x0112  # EXIF tag
TRANSPOSED = (5, 6, 7, 8)  # orientations that swap height and width
# A JPEG is decoded at a half, a quarter or an eighth of its size, which is faster, if the window
# then still has this many times the pixels per side of its output. The result differs from that
# of a full decode by no more than good resampling filters differ from each other.
SPARE = 4 / 3


class Encoded:
    """A PNG, JPEG or WebP file whose header is read at once and whose pixels are decoded lazily.

    height, width: pixels of the upright image. A bad file raises Pillow's errors at either time.
    """

    def __init__(self, data: bytes):
        self._data = data
        self._image = None
        image = self._image = self._take()
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        orientation = image.getexif().get(ORIENTATION, 1)
        self._rotated = orientation in range(2, 9)  # or mirrored
        self.transposed = orientation in TRANSPOSED
        self.height, self.width = image.size if self.transposed else image.size[::-1]
        # A reduced decode rounds the size up at the right and bottom edges of the stored image;
        # rotation would move that fraction of a pixel to another edge.
        self._reducible = isinstance(image, JpegImageFile) and not self._rotated

    def decode(self) -> np.ndarray:
        """Decode the whole image, over white where transparent: (H, W, 3) uint8."""
        return self._decode(1)

    def window(self, top: int, left: int, side: int, size: int) -> np.ndarray:
        """Resize a square of the image, given in pixels, to (size, size, 3) uint8.

        The image is decoded at the smallest scale that suffices.
        """
        scales = (1, 2, 4, 8) if self._reducible else (1,)
        scale = max(s for s in scales if s == 1 or side >= s * SPARE * size)
        return resize(self._decode(scale), (left / scale, top / scale, side / scale), size)

    def _decode(self, scale: int) -> np.ndarray:
        """Decode the whole image at 1 / scale of its size, rounded up."""
        image = self._take()
        if self._reducible and image.mode in ("RGB", "L"):
            # Gives Pillow's pixels, faster. It rejects files that are not strictly valid JPEGs;
            # Pillow decodes those below or raises.
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(
                    self._data,
                    min_height=-(-self.height // scale),
                    min_width=-(-self.width // scale),
                )
        if scale > 1:
            image.draft(None, (self.width // scale, self.height // scale))
        if self._rotated:
            ImageOps.exif_transpose(image, in_place=True)
        return np.array(_rgb(image))

    def _take(self) -> Image.Image:
        """Open the file, or return it once as opened by __init__: drafts must not be reused."""
        image = self._image
        self._image = None
        return image or Image.open(io.BytesIO(self._data), formats=FORMATS)


def decode(data: bytes) -> np.ndarray:
    """Decode a PNG, JPEG or WebP file, upright, over white where transparent: (H, W, 3) uint8."""
    return Encoded(data).decode()


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, over white where transparent."""
    if image.mode.startswith("I"):
        # Pillow clips 16-bit gray to 255 on conversion; keep its high byte instead.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_error(error: Exception) -> str:
    """Classify an error raised by `decode`, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "too large"
    if isinstance(error, UnidentifiedImageError):
        return "not a JPEG, PNG or WebP image"
    return "damaged image"
