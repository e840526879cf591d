"""Face blurring, which the paper applies to its training data."""

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from condiff_jax.data.builders.units import BoxesError

RADIUS = 0.12  # of the blur, as a fraction of the box's diagonal
QUALITY = 95  # of the JPEG file of a blurred image


def load_boxes(path: str) -> dict[str, list]:
    """Read {image key: [(left, top, right, bottom) in pixels, ...]}; BoxesError if malformed."""
    if not path:
        return {}
    try:
        boxes = json.loads(Path(path).expanduser().read_bytes())
        for key, image_boxes in boxes.items():
            if not all(len(box) == 4 and np.isfinite(np.float64(box)).all() for box in image_boxes):
                raise ValueError(f"{key} has {image_boxes}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BoxesError(
            f"{path} cannot be read as {{key: [[left, top, right, bottom], ...]}} ({error})"
        ) from error
    return boxes


def blur(pixels: np.ndarray, boxes: list) -> bytes:
    """Blur the boxes of an image (H, W, 3) uint8; returns a JPEG file."""
    image = Image.fromarray(pixels)
    for left, top, right, bottom in boxes:
        box = (int(left), int(top), math.ceil(right), math.ceil(bottom))
        box = (max(0, box[0]), max(0, box[1]), min(image.width, box[2]), min(image.height, box[3]))
        if box[0] >= box[2] or box[1] >= box[3]:
            continue  # outside of the image
        radius = RADIUS * math.hypot(right - left, bottom - top)
        blurred = image.filter(ImageFilter.GaussianBlur(radius))
        image.paste(blurred.crop(box), box)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
