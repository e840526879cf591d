"""Grids of images with a caption under each."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 128  # pixels to which each image is enlarged at least
MAX_LINES = 4  # of a caption
INK, FRAME, PAPER = "#202124", "#dadce0", "white"


def caption_grid(
    images: np.ndarray,
    captions: Sequence[str] | None,
    *,
    columns: int | None = None,
    scale: int | None = None,
    title: str | None = None,
) -> Image.Image:
    """Draw images uint8 (N, H, W, 3) in rows on white, with centered captions below.

    scale: factor by which images are enlarged. ValueError for no images, a wrong shape, or
    captions, columns or scale that do not fit.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"images are {images.dtype} {images.shape}: give uint8 (N>0, H, W, 3)")
    count, height, width, _ = images.shape
    if captions is not None and len(captions) != count:
        raise ValueError(f"captions: got {len(captions)} for {count} images")
    scale = math.ceil(MIN_WIDTH / width) if scale is None else scale
    columns = min(count, math.ceil(math.sqrt(count)) if columns is None else columns)
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns}, scale={scale}: both must be at least 1")

    width, height = width * scale, height * scale
    font = ImageFont.load_default(size=min(24, max(13, width // 10)))
    title_font = ImageFont.load_default(size=round(1.4 * font.size))
    pad = max(12, width // 12)
    gap = pad // 3  # between an image and its caption
    total_width = columns * (width + pad) + pad
    texts = [wrap(text, font, width) for text in captions or [""] * count]
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    title_lines = wrap(title or "", title_font, total_width - 2 * pad)
    top = pad + (len(title_lines) * line_height(title_font) + gap if title_lines else 0)
    # The height of a row depends on its longest caption.
    text_heights = [max(len(texts[i]) for i in row) * line_height(font) for row in rows]
    row_heights = [height + (gap + text if text else 0) + pad for text in text_heights]

    grid = Image.new("RGB", (total_width, top + sum(row_heights)), PAPER)
    draw = ImageDraw.Draw(grid)
    draw_lines(draw, title_lines, title_font, total_width / 2, pad)
    for row, row_height in zip(rows, row_heights, strict=True):
        for column, i in enumerate(row):
            left = pad + column * (width + pad)
            # The frame is outside the image, whose own edge may be as white as the background.
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
            image = Image.fromarray(images[i])
            grid.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
            draw_lines(draw, texts[i], font, left + width / 2, top + height + gap)
        top += row_height
    return grid


def line_height(font) -> int:
    """Return the pixels from one line of text to the next."""
    return round(1.15 * sum(font.getmetrics()))


def draw_lines(draw: ImageDraw.ImageDraw, lines: list[str], font, middle: float, top: int) -> None:
    """Draw lines downwards from `top`, each centered at x = `middle`, in pixels."""
    for number, line in enumerate(lines):
        left = round(middle - font.getlength(line) / 2)
        draw.text((left, top + number * line_height(font)), line, INK, font)


def wrap(text: str, font, width: int, max_lines: int = MAX_LINES) -> list[str]:
    """Wrap a text into at most `max_lines` lines of at most `width` pixels.

    An ellipsis ends a text that is cut short.
    """
    lines, line = [], ""
    words = text.split()[::-1]
    while words and len(lines) < max_lines:
        word = words.pop()
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
        elif line:
            lines, line = [*lines, line], ""
            words.append(word)
        else:  # a word longer than a line is cut; at least one letter goes on each line
            lengths = range(min(len(word), width), 1, -1)
            cut = next((n for n in lengths if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:cut])
            words += [word[cut:]] if word[cut:] else []
    if not words:
        return [*lines, line] if line else lines
    last = lines[-1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[:-1], last.rstrip() + "…"]
