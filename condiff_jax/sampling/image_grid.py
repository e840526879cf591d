"""Grids of pictures with a caption under each."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MIN_WIDTH = 128  # pixels that each picture is enlarged to, at least
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
    """uint8 (N, H, W, 3) in rows on white, enlarged `scale` times, captions centred below.

    ValueError for no images, a wrong shape, or captions, columns or scale that do not fit.
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
    heading = ImageFont.load_default(size=round(1.4 * font.size))
    pad = max(12, width // 12)
    gap = pad // 3  # between a picture and its caption
    total = columns * (width + pad) + pad
    texts = [wrap(text, font, width) for text in captions or [""] * count]
    rows = [range(start, min(start + columns, count)) for start in range(0, count, columns)]
    headline = wrap(title or "", heading, total - 2 * pad)
    top = pad + (len(headline) * line_height(heading) + gap if headline else 0)
    # A row is as tall as its longest caption needs.
    depths = [max(len(texts[i]) for i in row) * line_height(font) for row in rows]
    heights = [height + (gap + depth if depth else 0) + pad for depth in depths]

    grid = Image.new("RGB", (total, top + sum(heights)), PAPER)
    draw = ImageDraw.Draw(grid)
    write(draw, headline, heading, total / 2, pad)
    for row, tall in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = pad + column * (width + pad)
            # The frame lies outside the picture, whose own edge may be as white as the paper.
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
            picture = Image.fromarray(images[i])
            grid.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
            write(draw, texts[i], font, left + width / 2, top + height + gap)
        top += tall
    return grid


def line_height(font) -> int:
    """Pixels from one line of text to the next."""
    return round(1.15 * sum(font.getmetrics()))


def write(draw: ImageDraw.ImageDraw, lines: list[str], font, middle: float, top: int) -> None:
    """Draws lines downwards from `top`, each centred on x = `middle`, in pixels."""
    for number, line in enumerate(lines):
        left = round(middle - font.getlength(line) / 2)
        draw.text((left, top + number * line_height(font)), line, INK, font)


def wrap(text: str, font, width: int, lines: int = MAX_LINES) -> list[str]:
    """At most `lines` lines of at most `width` pixels; an ellipsis ends a text cut short."""
    done, line, words = [], "", text.split()[::-1]
    while words and len(done) < lines:
        word = words.pop()
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
        elif line:
            done, line = [*done, line], ""
            words.append(word)
        else:  # a word too long for a line of its own, of which at least a letter goes on
            lengths = range(min(len(word), width), 1, -1)
            cut = next((n for n in lengths if font.getlength(word[:n]) <= width), 1)
            done.append(word[:cut])
            words += [word[cut:]] if word[cut:] else []
    if not words:
        return [*done, line] if line else done
    last = done[-1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*done[:-1], last.rstrip() + "…"]
