"""Procedural data set of captioned scenes: colored shapes on textured backgrounds."""

import colorsys
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "yellow", "green", "cyan", "blue", "purple")  # hues 60 degrees apart, from 0
POSITIONS = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
SIZES = ("small", "medium", "large")
RELATIONS = ("left of", "right of", "above", "below")
TONES = ("dark", "grey", "pale")
TEXTURES = ("plain", "striped", "checked", "dotted", "grainy")
SPLITS = ("train", "validation")
WARM = ("red", "yellow", "purple")
CLASSES = tuple(f"{heat} {shape}" for heat in ("warm", "cool") for shape in SHAPES)
FINE_CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
LABELS = {0: CLASSES, len(CLASSES): CLASSES, len(FINE_CLASSES): FINE_CLASSES}  # by their number

TEMPLATES = {  # captions of each kind of scene; every template names color and shape
    "placed": (
        "{colour} {shape} {position}",
        "{colour} {shape} {at}",
        "a {colour} {shape} {at}",
        "a {size} {colour} {shape} {at}",
        "there is a {colour} {shape} {at}",
        "a picture of a {colour} {shape} {at}",
        "{at} a {colour} {shape} on a {texture} background",
        "a {size} {colour} {shape} {at} of a {tone} {texture} picture",
    ),
    "bare": (
        "{colour} {shape}",
        "a {colour} {shape}",
        "a {size} {colour} {shape}",
        "a {colour} {shape} on a {tone} {texture} background",
    ),
    "long": (
        "this picture shows one {size} {colour} {shape} placed {at}"
        " in front of a {tone} {texture} background",
        "there is nothing but a {colour} {shape} {at} of this picture"
        " and behind it a {tone} {texture} background",
    ),
    "pair": (
        "{colour} {shape} {relation} {colour2} {shape2}",
        "a {colour} {shape} {relation} a {colour2} {shape2}",
        "a {size} {colour} {shape} {relation} a {size2} {colour2} {shape2}",
        "a {colour} {shape} {at} and a {colour2} {shape2} {at2}",
        "a {colour} {shape} {at} and {relation} a {colour2} {shape2}",
        "a {colour} {shape} {relation} a {colour2} {shape2} on a {tone} {texture} background",
        "this picture shows a {size} {colour} {shape} {relation} a {size2} {colour2} {shape2}"
        " in front of a {tone} {texture} background",
        "a {size} {colour} {shape} {at} and {relation} a {size2} {colour2} {shape2} {at2}",
    ),
}
AT = {name: f"in the {name} corner" for name in POSITIONS if " " in name}
AT |= {"top": "at the top", "bottom": "at the bottom", "center": "in the center"}
AT |= {"left": "on the left", "right": "on the right"}

DIAMETERS = {1: (0.4, 0.5, 0.6), 2: (0.26, 0.32, 0.38)}  # by number of objects, then by size
PAIR_SHARE = 0.25
CELL_SHARE = 0.35  # centers lie in this inner part of their third, so that positions are clear
CUT_SHARE = 0.15  # at most this fraction of a diameter lies outside the image
ASPECT = 9 / 8


@dataclass(frozen=True)
class Object:
    """One shape; x, y are fractions of width and height, diameter of the short side."""

    shape: str
    colour: str  # named like its metric
    size: str
    position: str
    x: float
    y: float
    diameter: float
    rgb: tuple[float, float, float]  # exact color, each channel in 0..1


@dataclass(frozen=True)
class Background:
    """Texture of mean color rgb (0..1), amplitude contrast, and period in short sides."""

    tone: str
    texture: str
    rgb: tuple[float, float, float]
    contrast: float
    period: float
    angle: float  # radians
    phase: float  # 0..1, also shifts the grain


@dataclass(frozen=True)
class Scene:
    """A captioned scene of height x width pixels; objects[0], the main object, is named first."""

    objects: tuple[Object, ...]
    relation: str | None  # of the main object to the second one
    background: Background
    height: int
    width: int
    caption: str
    mentions: frozenset[str]  # attributes of the main object that the caption states


def held_out(color: str, shape: str, position: str) -> bool:
    """Whether the combination is excluded from all training scenes."""
    code = COLORS.index(color) + 2 * SHAPES.index(shape) + 4 * POSITIONS.index(position)
    return code % 7 == 0


def _relations(position: str, position2: str) -> list[str]:
    """Relations of position to position2 that are unambiguous, that is, two thirds apart."""
    row, column = divmod(POSITIONS.index(position), 3)
    row2, column2 = divmod(POSITIONS.index(position2), 3)
    holds = (column2 - column == 2, column - column2 == 2, row2 - row == 2, row - row2 == 2)
    return list(itertools.compress(RELATIONS, holds))


def _vocabulary() -> tuple[str, ...]:
    texts = [re.sub(r"\{\w+\}", " ", t) for group in TEMPLATES.values() for t in group]
    names = (SHAPES, COLORS, POSITIONS, SIZES, RELATIONS, TONES, TEXTURES, CLASSES, AT.values())
    texts += itertools.chain.from_iterable(names)
    return tuple(sorted({word for text in texts for word in text.split()}))


def _mentions(template: str) -> frozenset[str]:
    fields = {"position" if f == "at" else f for f in re.findall(r"\{(\w+)\}", template)}
    return frozenset(fields & {"colour", "shape", "position", "size", "relation"})


def _grain(side: int = 128) -> np.ndarray:
    """Fixed noise (side, side) of equal power per octave, so it has detail at every scale."""
    rng = np.random.default_rng(1)
    cells = [2**k for k in range(3, side.bit_length())]
    octaves = [np.kron(rng.uniform(-1, 1, (n, n)), np.ones((side // n,) * 2)) for n in cells]
    return (np.sum(octaves, axis=0) / math.sqrt(len(cells))).astype(np.float32)


VOCABULARY = _vocabulary()
MENTIONS = {template: _mentions(template) for group in TEMPLATES.values() for template in group}
TRIPLES = {
    split: [t for t in itertools.product(COLORS, SHAPES, POSITIONS) if held_out(*t) == unseen]
    for split, unseen in zip(SPLITS, (False, True), strict=True)
}
APART = {p: [q for q in POSITIONS if _relations(p, q)] for p in POSITIONS}
SECOND = {  # (color of the main object, position) -> second objects, of another color
    (color, position): [t for t in TRIPLES["train"] if t[2] == position and t[0] != color]
    for color, position in itertools.product(COLORS, POSITIONS)
}
GRAIN = _grain()
GRAIN_CELLS = 96  # per short side: as fine as the largest native pixels


def label(color: str, shape: str, classes: int = 0) -> int:
    """Index of a main object's class in LABELS[classes]; KeyError for an unknown `classes`."""
    names = LABELS[classes]
    if names is FINE_CLASSES:
        return names.index(f"{color} {shape}")
    return names.index(f"{'warm' if color in WARM else 'cool'} {shape}")


class _Dice:
    """Random choices from one block of uniform numbers, as single draws are slow."""

    def __init__(self, split: str, index: int):
        rng = np.random.default_rng([SPLITS.index(split), index])
        *rolls, self.spare = rng.random(48).tolist()
        self.roll: Callable[[], float] = iter(rolls).__next__

    def pick(self, options):
        return options[int(self.roll() * len(options))]

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.roll()


def _object(dice: _Dice, triple: tuple[str, str, str], count: int) -> Object:
    """Sample an object of the triple's color, shape and position for a scene of count objects."""
    color, shape, position = triple
    size = int(dice.roll() * 3)
    diameter = DIAMETERS[count][size] * dice.between(0.96, 1.04)
    inset = (0.5 - CUT_SHARE) * diameter
    row, column = divmod(POSITIONS.index(position), 3)
    margin = (1 - CELL_SHARE) / 2
    x, y = (
        dice.between(max((k + margin) / 3, inset), min((k + 1 - margin) / 3, 1 - inset))
        for k in (column, row)
    )
    hue = COLORS.index(color) / 6 + dice.between(-8, 8) / 360
    rgb = colorsys.hsv_to_rgb(hue % 1, dice.between(0.82, 1), dice.between(0.75, 1))
    return Object(shape, color, SIZES[size], position, x, y, diameter, rgb)


def _background(dice: _Dice, tone: int | None) -> Background:
    """Sample a background of the tone with this index, or of a random tone if None."""
    random_tone = int(dice.roll() * 3)  # used or not, to keep the order of random numbers
    tone = random_tone if tone is None else tone
    value = (0.22, 0.46, 0.74)[tone] + dice.between(-0.06, 0.06)
    rgb = colorsys.hsv_to_rgb(dice.roll(), dice.between(0, 0.12), value)
    return Background(
        tone=TONES[tone],
        texture=dice.pick(TEXTURES),
        rgb=rgb,
        contrast=dice.between(0.04, 0.08),
        period=dice.between(0.11, 0.24),
        angle=int(dice.roll() * 4) * math.pi / 4,
        phase=dice.roll(),
    )


def _native_size(dice: _Dice, sizes: tuple[int, int]) -> tuple[int, int]:
    """Sample height and width: short side log-uniform in sizes, aspect in 8:9 to 9:8."""
    short = round(math.exp(dice.between(math.log(sizes[0]), math.log(sizes[1]))))
    stretch = dice.between(-1, 1)
    long = round(short * ASPECT ** abs(stretch))
    return (short, long) if stretch > 0 else (long, short)


def _caption(
    template: str, objects: tuple[Object, ...], relation: str | None, background: Background
) -> str:
    fields = {"relation": relation, "tone": background.tone, "texture": background.texture}
    for item, suffix in zip(objects, ("", "2"), strict=False):
        fields["colour" + suffix] = item.colour
        fields["shape" + suffix] = item.shape
        fields["size" + suffix] = item.size
        fields["position" + suffix] = item.position
        fields["at" + suffix] = AT[item.position]
    return template.format_map(fields)


def _size_third(short: int, sizes: tuple[int, int]) -> int:
    """Return the third (0, 1 or 2) of the log-scaled range `sizes` in which a short side lies."""
    low, high = map(math.log, sizes)
    return min(int(3 * (math.log(short) - low) / max(high - low, 1e-9)), 2)


def make_scene(
    split: str, index: int, sizes: tuple[int, int] = (24, 96), entangled: float = 0.0
) -> Scene:
    """Create scene `index` of a split; `sizes` bounds the short side in pixels.

    entangled: share of scenes in which the size determines the background's tone, from dark for
    small scenes to pale for large ones. It imitates web images, whose size correlates with content.
    ValueError for bad arguments.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if not 8 <= sizes[0] <= sizes[1]:
        raise ValueError(f"sizes must be (min, max) of the short side, 8 or more, got {sizes}")
    dice = _Dice(split, index)
    height, width = _native_size(dice, sizes)
    third = _size_third(min(height, width), sizes)
    background = _background(dice, third if dice.spare < entangled else None)
    main = dice.pick(TRIPLES[split])
    apart = APART[main[2]]
    # No cell is two thirds away from the center, so main objects in the other eight cells have more
    # pairs, to PAIR_SHARE in total.
    pair = dice.roll() < PAIR_SHARE * 9 / 8 and bool(apart)
    objects = (_object(dice, main, 1 + pair),)
    relation = None
    if pair:
        second = dice.pick(SECOND[main[0], dice.pick(apart)])
        objects += (_object(dice, second, 2),)
        relation = dice.pick(_relations(main[2], second[2]))
        template = dice.pick(TEMPLATES["pair"])
    else:
        u = dice.roll()
        if u < 0.8:
            kind = "placed"
        elif u < 0.92:
            kind = "bare"
        else:
            kind = "long"
        template = dice.pick(TEMPLATES[kind])
    return Scene(
        objects=objects,
        relation=relation,
        background=background,
        height=height,
        width=width,
        caption=_caption(template, objects, relation, background),
        mentions=MENTIONS[template],
    )


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Coverage (h, w) of pixels at offsets x (w,) and y (h, 1), in pixels, from the center."""
    if shape in ("circle", "ring"):
        outside = np.sqrt(x * x + y * y) - radius
        if shape == "ring":
            outside = np.abs(outside + 0.25 * radius) - 0.25 * radius
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y)) - radius
    elif shape == "cross":
        x, y = np.abs(x), np.abs(y)
        outside = np.maximum(np.minimum(x, y) - 0.3 * radius, np.maximum(x, y) - radius)
    else:  # triangle: apex up, base 2 radii wide, 1.75 radii high
        slope = math.hypot(1.75, 1)
        side = (1.75 * np.abs(x) - (y + 0.875 * radius)) / slope
        outside = np.maximum(side, y - 0.875 * radius)
    return np.clip(0.5 - outside, 0, 1)  # antialiased by a ramp of one pixel


def _wave(phase: np.ndarray, period: float) -> np.ndarray:
    """Square wave in -1..1 with period 1 in phase and edges of one pixel (period in pixels)."""
    triangle = np.abs(4 * (phase - np.floor(phase)) - 2) - 1
    return np.clip(triangle * np.float32(period / 2), -1, 1)


def _texture(background: Background, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Background pattern, (height, width) or (1, 1), and grain (height, width), about -1..1."""
    short = min(height, width)
    x = (np.arange(width, dtype=np.float32) + 0.5) / short
    y = (np.arange(height, dtype=np.float32) + 0.5)[:, None] / short
    period, phase = background.period, background.phase
    rows, columns = ((t * GRAIN_CELLS + 128 * phase).astype(np.intp) % 128 for t in (y, x))
    grain = GRAIN[rows, columns]
    if background.texture == "striped":
        across = x * math.cos(background.angle) + y * math.sin(background.angle)
        pattern = _wave(across / period + phase, period * short)
    elif background.texture == "checked":
        pattern = _wave(x / period + phase, period * short) * _wave(y / period, period * short)
    elif background.texture == "dotted":
        dots = np.cos(2 * math.pi * (x / period + phase)) + np.cos(2 * math.pi * y / period)
        pattern = np.clip((dots - 0.6) * np.float32(period * short / 3), -1, 1)
    elif background.texture == "grainy":
        pattern = grain
    else:
        pattern = np.zeros((1, 1), np.float32)
    return pattern, grain


def render(scene: Scene, height: int | None = None, width: int | None = None) -> np.ndarray:
    """Render a scene to uint8 (H, W, 3), at its native or any other size."""
    height = scene.height if height is None else height
    width = scene.width if width is None else width
    pattern, grain = _texture(scene.background, height, width)
    image = np.empty((3, height, width), np.float32)  # planar: broadcasting is faster
    pattern = pattern * np.float32(255 * scene.background.contrast)
    for plane, level in zip(image, scene.background.rgb, strict=True):
        np.add(pattern, np.float32(255 * level), out=plane)
    for item in scene.objects:
        diameter = item.diameter * min(height, width)
        x, y, reach = item.x * width, item.y * height, diameter / 2 + 1
        left, right = max(int(x - reach), 0), min(int(x + reach) + 1, width)
        top, bottom = max(int(y - reach), 0), min(int(y + reach) + 1, height)
        xs = np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)
        ys = np.arange(top, bottom, dtype=np.float32)[:, None] + np.float32(0.5 - y)
        mask = _coverage(item.shape, xs, ys, diameter / 2)  # (h, w)
        patch = image[:, top:bottom, left:right]
        rgb = np.array(item.rgb, np.float32)[:, None, None] * 255
        patch += mask * (rgb - patch)
    image += grain * np.float32(4)
    np.clip(image, 0, 255, out=image)
    return np.ascontiguousarray((image + np.float32(0.5)).astype(np.uint8).transpose(1, 2, 0))


class Shapes:
    """Random access to the scenes of a split as records of image, caption and label."""

    def __init__(
        self,
        split: str = "train",
        sizes: tuple[int, int] = (24, 96),
        classes: int = 0,
        entangled: float = 0.0,
    ):
        make_scene(split, 0, sizes)  # bad arguments fail here, not in a worker
        self.split, self.sizes, self.entangled = split, sizes, entangled
        self.classes = LABELS[classes]

    def __len__(self) -> int:
        return 2**31 - 1 if self.split == "train" else 10_000

    def __getitem__(self, index: int) -> dict:
        """Return the record of uint8 image (H, W, 3), caption and int32 label."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} is outside 0..{len(self) - 1}")
        scene = make_scene(self.split, index, self.sizes, self.entangled)
        main = scene.objects[0]
        class_index = label(main.colour, main.shape, len(self.classes))
        return {"image": render(scene), "caption": scene.caption, "label": np.int32(class_index)}

    def vocabulary(self) -> tuple[str, ...]:
        """All words of captions and class names, sorted."""
        return VOCABULARY


def prompts(n: int, offset: int = 0) -> list[Scene]:
    """Return n validation scenes from offset on whose captions fully describe a single object."""
    scenes = (make_scene("validation", index) for index in itertools.count())
    suitable = (
        scene
        for scene in scenes
        if len(scene.objects) == 1 and {"colour", "shape", "position"} <= scene.mentions
    )
    return list(itertools.islice(suitable, offset, offset + n))
