"""Detection of shapes in images without a network, and prompt accuracy based on it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from condiff_jax.data.shapes import COLORS, POSITIONS, SHAPES, WARM

ATTRIBUTES = ("colour", "shape", "position", "relation", "left_right")
MIN_CHROMA = 36  # gray levels; weaker tints belong to the background
MIN_AREA = 0.012  # share of the image; smaller blobs are speckle
WORKING_SIDE = 48  # images with twice this short side or more are reduced first
EDGES = (1.0, 2.5)  # widths of sharp and blurred edges in pixels
MIN_CONFIDENCE = 0.6  # blobs that fit all shapes less are not shapes
CLEAR_OFFSET = 0.15  # least offset of a relation, as a share of the image side


@dataclass(frozen=True)
class Detection:
    """Detected shape: center (x, y) in fractions of the image, size sqrt(area) / short side."""

    colour: str
    shape: str
    position: str
    x: float
    y: float
    size: float
    confidence: float  # share of the blob's energy that the ideal shape explains, 0..1


def _check_image(image: np.ndarray) -> None:
    """Raise ValueError unless an image is uint8 (H, W, 3) with sides from 16."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if min(image.shape[:2]) < 16:
        raise ValueError(f"image must be 16 pixels or more a side, got {image.shape[:2]}")


def _chroma(image: np.ndarray) -> np.ndarray:
    """Map to the complex hue plane (H, W): pure red is 255, the angle is the hue, grays are 0."""
    factor = min(image.shape[:2]) // WORKING_SIDE
    image = image.astype(np.float32)
    if factor > 1:
        height, width = (n // factor * factor for n in image.shape[:2])
        blocks = image[:height, :width].reshape(height // factor, factor, -1, factor, 3)
        image = blocks.mean((1, 3))
    red, green, blue = np.moveaxis(image, 2, 0)
    return red - (green + blue) / 2 + 1j * (math.sqrt(3) / 2) * (green - blue)


def _blobs(chroma: np.ndarray, count: int) -> list[np.ndarray]:
    """Find soft masks (H, W) in 0..1 of the `count` largest colored regions, largest first."""
    background = np.median(chroma.real) + 1j * np.median(chroma.imag)
    chroma = chroma - background
    strength = np.abs(chroma)
    # Neighboring pixels of noise have random hues, which cancel; those of a shape add up.
    smooth = np.abs(ndimage.uniform_filter(chroma, 3))
    floor = max(MIN_CHROMA, 4 * np.median(smooth))  # most of an image is background
    colored = smooth > max(floor, 0.4 * np.percentile(smooth, 98))
    labels, regions = ndimage.label(colored, np.ones((3, 3)))
    masks = []
    for region in range(1, regions + 1):
        inside = labels == region
        if inside.sum() < MIN_AREA * inside.size:
            continue
        level = np.percentile(strength[inside], 75)
        near = ndimage.binary_dilation(inside, iterations=2) & ((labels == 0) | inside)
        masks.append(np.where(near, np.minimum(strength / level, 1), 0))
    return sorted(masks, key=np.sum, reverse=True)[:count]


def _outside(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute the signed distance to an ideal shape of half width 1; negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    x = np.abs(x)
    if shape == "square":
        return np.maximum(x, np.abs(y)) - 1
    if shape == "triangle":
        return np.maximum((1.75 * x - y - 0.875) / math.hypot(1.75, 1), y - 0.875)
    y = np.abs(y)
    return np.maximum(np.minimum(x, y) - 0.3, np.maximum(x, y) - 1)


def _misfits(shape: str, edge: float, patch: tuple, fits: np.ndarray) -> np.ndarray:
    """Compute squared errors (N,) of ideal shapes `fits` (N, 3: x, y, radius in pixels) to a patch.

    edge: width of the soft edge in pixels. patch: a mask (h, w), and the x and y of its first
    pixel's center. The intensity of the ideal shape is fitted, because blur dims thin shapes.
    """
    mask, x0, y0 = patch
    x, y, radius = (column[:, None, None] for column in fits.T)
    xs = (x0 + np.arange(mask.shape[1]) - x) / radius
    ys = (y0 + np.arange(mask.shape[0])[:, None] - y) / radius
    ideal = np.clip(0.5 - _outside(shape, xs, ys) * (radius / edge), 0, 1)
    overlap, energy = np.einsum("nhw,hw->n", ideal, mask), np.einsum("nhw,nhw->n", ideal, ideal)
    return np.square(mask).sum() - overlap**2 / np.maximum(energy, 1e-6)


def _fit(mask: np.ndarray) -> tuple[str, float, float, float]:
    """Fit ideal shapes to a soft mask (H, W): name, center x and y in pixels, and misfit.

    Only pixels of the image count, so a shape cut by the border fits as well as a whole one.
    """
    rows, columns = (np.flatnonzero((mask > 0.5).any(axis)) for axis in (1, 0))
    top, bottom = max(rows[0] - 2, 0), min(rows[-1] + 3, mask.shape[0])
    left, right = max(columns[0] - 2, 0), min(columns[-1] + 3, mask.shape[1])
    patch = mask[top:bottom, left:right].astype(np.float32), left + 0.5, top + 0.5
    middle = [(columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2]
    radius = (max(np.ptp(rows), np.ptp(columns)) + 1) / 2
    steps = np.stack(np.meshgrid(*[[-1, 0, 1]] * 3), -1).reshape(-1, 3)  # (27, 3)
    best = (np.inf, "", 0.0, 0.0)
    for shape, edge in itertools.product(SHAPES, EDGES):
        guess, step = np.array([*middle, radius]), 0.16 * radius
        for _ in range(4):
            guesses = (guess + step * steps).astype(np.float32)
            misfits = _misfits(shape, edge, patch, guesses)
            guess, step = guesses[misfits.argmin()], step / 2
        best = min(best, (float(misfits.min()), shape, float(guess[0]), float(guess[1])))
    misfit, shape, x, y = best
    return shape, x, y, misfit


def detect(image: np.ndarray, max_objects: int = 2) -> list[Detection]:
    """Detect colored shapes in a uint8 image (H, W, 3), largest first; ValueError for bad input."""
    _check_image(image)
    chroma = _chroma(image)
    height, width = chroma.shape
    detections = []
    for mask in _blobs(chroma, max_objects):
        shape, x, y, misfit = _fit(mask)
        confidence = 1 - misfit / float(np.square(mask).sum())
        if confidence < MIN_CONFIDENCE:
            continue
        hue = np.angle(chroma[mask > 0.8].sum()) / (2 * math.pi)
        x, y = min(max(x / width, 0), 1), min(max(y / height, 0), 1)
        cell = 3 * min(int(3 * y), 2) + min(int(3 * x), 2)
        detections.append(
            Detection(
                colour=COLORS[round(6 * hue) % 6],
                shape=shape,
                position=POSITIONS[cell],
                x=x,
                y=y,
                size=math.sqrt(mask.sum()) / min(height, width),
                confidence=confidence,
            )
        )
    return detections


def sharpness(image: np.ndarray) -> float:
    """Compute the mean absolute Laplacian of a uint8 image (H, W, 3) in gray levels."""
    _check_image(image)
    gray = image.astype(np.float32).mean(2)
    inner = gray[1:-1, 1:-1]
    around = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:]
    return float(np.abs(around - 4 * inner).mean())


def _relation_holds(relation: str, main: Detection, other: Detection) -> bool:
    offsets = {
        "left of": other.x - main.x,
        "right of": main.x - other.x,
        "above": other.y - main.y,
        "below": main.y - other.y,
    }
    return offsets[relation] > CLEAR_OFFSET


def _match_scene(image: np.ndarray, scene) -> dict[str, bool]:
    """Compare an image with each attribute that the scene's caption mentions.

    left_right, which is wrong in mirrored images: whether the main object is in the half that its
    position names, and left of or right of the other one as its relation says.
    """
    target = scene.objects[0]
    detections = detect(image, max_objects=2)
    if len(scene.objects) == 1:
        detections = detections[:1]
    # The sort is stable: without an object of the target's color the largest one is first.
    detections.sort(key=lambda item: item.colour != target.colour)
    main = detections[0] if detections else None
    matches = {}
    for name in ATTRIBUTES[:3]:
        if name in scene.mentions:
            matches[name] = main is not None and getattr(main, name) == getattr(target, name)
    if "relation" in scene.mentions:
        matches["relation"] = (
            len(detections) == 2
            and main.colour == target.colour
            and _relation_holds(scene.relation, *detections)
        )
    sides = []
    if "position" in scene.mentions and (" " + target.position).endswith((" left", " right")):
        sides.append(main is not None and (main.x < 0.5) == target.position.endswith("left"))
    if "relation" in scene.mentions and scene.relation.endswith(" of"):
        sides.append(matches["relation"])
    if sides:
        matches["left_right"] = all(sides)
    return matches


def _check_images(images: np.ndarray, count: int, what: str) -> np.ndarray:
    """Return images as an array; ValueError unless they are uint8 (count > 0, H, W, 3)."""
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    if len(images) != count or not count:
        raise ValueError(f"need as many images as {what}, got {len(images)} and {count}")
    return images


def prompt_accuracy(images: np.ndarray, scenes: Sequence) -> dict[str, float]:
    """Compute the share of images (N, H, W, 3) uint8 that match the captions of N scenes.

    Keys: each of ATTRIBUTES, among the scenes that mention it (left out if none does), and "all".
    The main object is the detection of its color, else the largest. ValueError if empty or
    mismatched.
    """
    images = _check_images(images, len(scenes), "scenes")
    results = [_match_scene(image, scene) for image, scene in zip(images, scenes, strict=True)]
    accuracy = {}
    for name in ATTRIBUTES:
        matches = [result[name] for result in results if name in result]
        if matches:
            accuracy[name] = float(np.mean(matches))
    accuracy["all"] = float(np.mean([all(result.values()) for result in results]))
    return accuracy


def _match_class(image: np.ndarray, name: str) -> dict[str, bool]:
    """Compare the best-fitting shape of an image with a class such as "warm circle"."""
    color, shape = name.split()
    cool = [c for c in COLORS if c not in WARM]
    colors = {"warm": WARM, "cool": cool}.get(color, (color,))
    if shape not in SHAPES or not set(colors) <= set(COLORS):
        raise ValueError(f"class {name!r} does not name a color, warm or cool and a shape")
    matches = [(d.colour in colors, d.shape == shape) for d in detect(image, max_objects=2)]
    color_matches, shape_matches = max(matches, key=sum, default=(False, False))
    return {"colour": color_matches, "shape": shape_matches}


def class_accuracy(
    images: np.ndarray, labels: Sequence[int], classes: Sequence[str]
) -> dict[str, float]:
    """Compute the share of images (N, H, W, 3) uint8 that match the classes of labels (N,).

    Keys: "colour" (warm or cool for classes that name these), "shape" and "all". Of two shapes the
    one that fits better counts, because images of the data may contain another one. ValueError if
    empty, mismatched, or for classes not named as in `shapes.LABELS`.
    """
    images = _check_images(images, len(labels), "labels")
    results = [
        _match_class(image, classes[label]) for image, label in zip(images, labels, strict=True)
    ]
    accuracy = {
        name: float(np.mean([result[name] for result in results])) for name in ("colour", "shape")
    }
    return accuracy | {"all": float(np.mean([all(result.values()) for result in results]))}
