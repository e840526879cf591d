"""Image grids: every image is there, whole and in order, with its caption below."""

import math

import numpy as np
import pytest
from PIL import ImageFont

from condiff_jax.sampling.image_grid import MAX_LINES, caption_grid, wrap

FONT = ImageFont.load_default(size=13)


def random_images(count, height=16, width=16):
    return np.random.default_rng(count).integers(0, 256, (count, height, width, 3), np.uint8)


def locate(grid, image, scale):
    """Return (top, left) of the enlarged image, which must occur once in the grid."""
    block = image.repeat(scale, 0).repeat(scale, 1)
    height, width = block.shape[:2]
    corners = np.argwhere((grid == block[0, 0]).all(-1))
    positions = [
        (int(y), int(x))
        for y, x in corners
        if grid[y : y + height, x : x + width].shape == block.shape
        and (grid[y : y + height, x : x + width] == block).all()
    ]
    assert len(positions) == 1
    return positions[0]


@pytest.mark.parametrize("count, columns", [(1, None), (5, None), (7, 3), (4, 9), (3, 1)])
def test_images_in_reading_order_with_text_below(count, columns):
    images, scale = random_images(count), 8
    captions = [f"caption number {i} " * (i % 3 + 1) for i in range(count)]
    grid = np.asarray(caption_grid(images, captions, columns=columns))
    positions = [locate(grid, image, scale) for image in images]
    per_row = min(count, columns or math.ceil(math.sqrt(count)))
    tops, lefts = (sorted({position[axis] for position in positions}) for axis in (0, 1))
    assert positions == [(tops[i // per_row], lefts[i % per_row]) for i in range(count)]
    bottoms = [top - 1 for top in tops[1:]] + [grid.shape[0]]
    for i, (top, left) in enumerate(positions):
        below = grid[top + 129 : bottoms[i // per_row], left : left + 128]
        assert (below < 100).all(-1).any()
    # The white margins on the left and on the right are equal and empty.
    pad = lefts[0] - 1
    assert grid.shape[1] == lefts[-1] + 128 + pad + 1
    assert (grid[:, :pad] == 255).all() and (grid[:, -pad:] == 255).all()
    for top in tops:  # captions of the row above end before the images
        assert (grid[top - pad : top - 1] == 255).all()
    assert (grid[:pad] == 255).all() and (grid[-pad:] == 255).all()


def test_without_captions_there_is_no_text():
    images = random_images(4)
    grid = np.array(caption_grid(images, None))
    for image in images:
        top, left = locate(grid, image, 8)
        grid[top : top + 128, left : left + 128] = 255
    assert grid.min() > 200
    assert caption_grid(images, [""] * 4).size == caption_grid(images, None).size


@pytest.mark.parametrize("width, scale", [(64, 2), (100, 2), (128, 1), (300, 1), (1, 128)])
def test_small_images_are_enlarged_by_whole_factors(width, scale):
    images = random_images(2, 4, width)
    locate(np.asarray(caption_grid(images, ["a", "b"])), images[1], scale)
    locate(np.asarray(caption_grid(images, ["a", "b"], scale=3)), images[1], 3)


def test_title_adds_text_on_top():
    images = random_images(2)
    plain = np.asarray(caption_grid(images, None))
    titled = np.asarray(caption_grid(images, None, title="Two images"))
    extra = titled.shape[0] - plain.shape[0]
    assert extra > 0 and (titled[:extra] < 100).any()
    assert (titled[-plain.shape[0] + 11 :] == plain[11:]).all()


def test_wrap_fits_breaks_and_shortens():
    assert wrap("two words", FONT, 500) == ["two words"]
    assert wrap("", FONT, 100) == [] == wrap(" \n", FONT, 100)
    text = "the quick brown fox jumps over a lazy dog"
    lines = wrap(text, FONT, 120)
    assert " ".join(lines) == text and len(lines) > 1
    assert all(FONT.getlength(line) <= 120 for line in lines)
    word = "abcdefgh" * 5
    assert "".join(wrap(word, FONT, 120)) == word
    assert not wrap("x" * MAX_LINES, FONT, 1)[-1].endswith("…")
    for long in (text * 9, "x" * 3000, "a " + "b" * 900):
        lines = wrap(long, FONT, 120)
        assert len(lines) == MAX_LINES and lines[-1].endswith("…")
        assert all(FONT.getlength(line) <= 120 for line in lines)


@pytest.mark.parametrize(
    "captions, options, message",
    [
        (["a"], {}, "captions: got 1 for 2"),
        (None, {"columns": 0}, "columns=0"),
        (None, {"scale": 0}, "scale=0"),
    ],
)
def test_bad_arguments(captions, options, message):
    with pytest.raises(ValueError, match=message):
        caption_grid(random_images(2), captions, **options)


@pytest.mark.parametrize(
    "images", [random_images(2)[:0], random_images(2)[0], random_images(2) / 255]
)
def test_bad_images(images):
    with pytest.raises(ValueError, match="images are"):
        caption_grid(images, None)
