"""A report as one HTML file: table, plots (SVG), sample grids and provenance, nothing remote."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from etils import epath

from condiff_jax.results import Line, Table, is_inside, measures

# Kinds of pictures of an evaluation, in the order in which they are shown.
PICTURES = {
    "sizes": "Same noise, different size control (the paper's Fig. 2)",
    "flip": "Same noise, without and with flip control (the paper's Fig. 6)",
    "grid": "Samples",
}
PNG = b"\x89PNG\r\n\x1a\n"  # how its files begin
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #60676f; --back: #fff; --line: #d9dde2;
  --head: #f3f5f7; --c0: #2166ac; --c1: #b2182b; --c2: #1b7837; --c3: #8c510a; --c4: #762a83;
  --c5: #50585f }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --soft: #a0a8b0; --back: #16191c;
  --line: #363c42; --head: #20252a; --c0: #6baed6; --c1: #f4877a; --c2: #74c476; --c3: #e0b060;
  --c4: #c39bd3; --c5: #b5bcc3 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; color: var(--ink); background: var(--back);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; line-height: 1.3 } h2 { font-size: 1.1rem; margin-top: 2rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; overflow-wrap: normal;
  border-bottom: 1px solid var(--line) }
thead th { background: var(--head); vertical-align: bottom }
thead tr:first-child th { text-align: left; border-left: 2px solid var(--back) }
tbody th, thead th:first-child { position: sticky; left: 0; text-align: left }
tbody th { font-weight: 500; background: var(--back); white-space: normal; max-width: 13rem;
  min-width: 7rem }
.plots, .pictures { display: grid; gap: 1.5rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)) }
tbody th span { white-space: nowrap }
figure { margin: 0 } figcaption { font-size: .875rem; margin-bottom: .35rem }
figure svg { display: block; width: 100%; max-width: 30rem; height: auto; overflow: visible }
figure img { display: block; max-width: 100%; height: auto }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif } svg .soft { fill: var(--soft) }
svg .axis { stroke: var(--line) } svg .dot { fill: var(--ink); stroke: var(--back) }
.legend { list-style: none; padding: 0; margin: .35rem 0 0; font-size: .8rem }
.legend span { display: inline-block; width: .8em; height: .8em; margin-right: .4em }
details { font-size: .875rem } pre { white-space: pre-wrap }
"""
COLOURS = 6  # --c0 to --c5


def html(table: Table, lines: Sequence[Line]) -> str:
    """The whole page; `lines` are the results behind the table, none for computed ones."""
    parts = [
        f"<h1>{escape(table.title)}</h1>",
        grid(table),
        notes(table.notes),
        plots(lines),
        pictures(lines),
        provenance(lines),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(table.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


def grid(table: Table) -> str:
    """The table, which scrolls sideways by itself."""
    groups = [
        (group, len(list(same)))
        for group, same in itertools.groupby(table.columns, key=lambda column: column[0])
    ]
    top = "".join(f'<th colspan="{n}" scope="colgroup">{escape(g)}</th>' for g, n in groups)
    names = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in table.columns)
    body = "\n".join(
        f'<tr><th scope="row">{_breakable(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in table.rows
    )
    return (
        f'<div class="scroll"><table>\n<thead><tr>{top}</tr>\n<tr>{names}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _breakable(row: str) -> str:
    """A row's name that breaks between its arguments only (5e-4 has a hyphen)."""
    return "<wbr>".join(f"<span>{escape(part)}</span>" for part in re.split(r"(?<=,)", row))


def notes(remarks: Iterable[str]) -> str:
    """The notes as a list."""
    items = "\n".join(f"<li>{escape(note)}</li>" for note in remarks)
    return f"<ul>\n{items}\n</ul>" if items else ""


def arguments(row: str) -> dict[str, str]:
    """A row "a=1,b=x" as {"a": "1", "b": "x"}."""
    return dict(item.partition("=")[::2] for item in row.split(",") if item)


def plots(lines: Sequence[Line]) -> str:
    """A plot of each metric over the rows: curves where an argument is a number, bars elsewhere."""
    figures = []
    for name in measures(lines):
        # Rows with other arguments are another experiment, with an axis of its own.
        with_name = [line for line in lines if line.values(name)]
        kinds = dict.fromkeys(tuple(arguments(line.row)) for line in with_name)
        for kind in kinds:
            some = [line for line in with_name if tuple(arguments(line.row)) == kind]
            axis = numeric(some)
            drawing = curves(some, name, axis) if axis else bars(some, name)
            over = f" over {axis}" if axis else ""
            caption = f"{escape(name)}{escape(over)}"
            figures.append(f"<figure><figcaption>{caption}</figcaption>{drawing}</figure>")
    if not figures:
        return ""
    head = "<h2>Measured</h2>\n<p>A dot is a seed; bars and lines are their means.</p>"
    return f'{head}\n<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def numeric(lines: Sequence[Line]) -> str:
    """The argument to plot over: it has three numbers or more, and most of all; "" if none has."""
    rows = [arguments(line.row) for line in lines]
    counts = {}
    for name in rows[0]:
        values = {row[name] for row in rows}
        if all(map(_is_number, values)):
            counts[name] = len(values)
    best = max(counts, key=counts.__getitem__, default="")
    return best if best and counts[best] >= 3 else ""


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def bars(lines: Sequence[Line], name: str) -> str:
    """Horizontal bars from zero, each under the name of its row; a dot for each seed."""
    width, height, room = 320, 34, 76
    values = [line.values(name) for line in lines]
    low = min(0.0, *(min(one) for one in values))
    high = max(0.0, *(max(one) for one in values))
    scale = (width - room) / ((high - low) or 1)
    parts = []
    for i, (line, seeds) in enumerate(zip(lines, values, strict=True)):
        mean, top = sum(seeds) / len(seeds), i * height
        left, right = sorted(((0 - low) * scale, (mean - low) * scale))
        parts += [
            f'<text x="0" y="{top + 11}">{escape(line.title)}</text>',
            f'<rect x="{left:.1f}" y="{top + 15}" width="{right - left:.1f}" height="12" '
            'fill="var(--c0)"/>',
            f'<text x="{(max(*seeds, mean, 0) - low) * scale + 7:.1f}" y="{top + 25}">'
            f"{mean:.4g}</text>",
        ]
        parts += [_dot((value - low) * scale, top + 21) for value in seeds]
    return _svg(width, height * len(lines), name, parts)


def curves(lines: Sequence[Line], name: str, axis: str) -> str:
    """The metric against an argument: a line for each choice of the others."""
    width, height, left, bottom, top = 320, 212, 46, 33, 8
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for line in lines:
        given = arguments(line.row)
        place = float(given.pop(axis))
        # Overrides make other lines, too.
        label = ", ".join(f"{key}={value}" for key, value in given.items())
        label += line.title.removeprefix(line.row)
        series.setdefault(label, []).append((place, line.values(name)))
    points = [point for some in series.values() for point in some]
    x, x_ticks = _axis([place for place, _ in points], left + 8, width - 20, logarithmic=True)
    y, y_ticks = _axis([one for _, seeds in points for one in seeds], height - bottom - 6, top + 6)
    parts = []
    for tick in y_ticks:
        parts += [
            f'<line class="axis" x1="{left}" x2="{width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>',
            f'<text class="soft" x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">'
            f"{tick:.6g}</text>",
        ]
    for tick in x_ticks:
        parts.append(
            f'<text class="soft" x="{x(tick):.1f}" y="{height - 17}" text-anchor="middle">'
            f"{tick:.6g}</text>"
        )
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 3}" text-anchor="middle">'
        f"{escape(axis)}</text>"
    )
    legend = []
    for number, (label, some) in enumerate(series.items()):
        colour = f"var(--c{number % COLOURS})"
        some = sorted(some)
        path = " ".join(f"{x(place):.1f},{y(sum(s) / len(s)):.1f}" for place, s in some)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [_dot(x(place), y(one), colour) for place, seeds in some for one in seeds]
        legend.append(f'<li><span style="background:{colour}"></span>{escape(label)}</li>')
    drawing = _svg(width, height, f"{name} over {axis}", parts)
    return drawing + (f'<ul class="legend">{"".join(legend)}</ul>' if any(series) else "")


def _axis(values: Sequence[float], start: float, end: float, *, logarithmic: bool = False):
    """(value -> place, ticks) of an axis from start to end."""
    low, high = min(values), max(values)
    if logarithmic and low > 0 and high / low >= 10:
        decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        parts = (1, 2, 5) if len(decades) <= 2 else (1,)
        ticks = [10.0**n * part for n in decades for part in parts]
        span = math.log(high / low)
        place = lambda value: start + (end - start) * math.log(value / low) / span  # noqa: E731
        return place, [tick for tick in ticks if low <= tick <= high]
    span = (high - low) or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / 3))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 5)
    # A tick may lie at the end but for rounding.
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    ticks = [n * step for n in range(first, last + 1)] or [low]
    return lambda value: start + (end - start) * (value - low) / span, ticks


def _dot(x: float, y: float, colour: str = "") -> str:
    fill = f' style="fill:{colour}"' if colour else ""
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"{fill}/>'


def _svg(width: int, height: int, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def pictures(lines: Sequence[Line]) -> str:
    """The grids of each row side by side, of its first seed; those that are still there."""
    sections = []
    found = dict.fromkeys(kind for line in lines for one in line.done for kind in one["pictures"])
    for kind in (*PICTURES, *(kind for kind in found if kind not in PICTURES)):
        figures = []
        for line in lines:
            for record in line.done:
                if data := picture(record, kind):
                    caption = escape(f"{line.title}, seed {record['seed']}")
                    figures.append(
                        f"<figure><figcaption>{caption}</figcaption>"
                        f'<img src="data:image/png;base64,{data}" alt="{caption}"></figure>'
                    )
                    break
        if figures:
            head = f"<h2>{escape(PICTURES.get(kind, kind))}</h2>"
            sections.append(f'{head}\n<div class="pictures">\n' + "\n".join(figures) + "\n</div>")
    return "\n".join(sections)


def picture(record: dict[str, Any], kind: str) -> str:
    """A PNG of a result in base64, "" where it is not there (as for recorded results).

    Results may come from others: no file of this machine for them, whatever they link to.
    """
    if kind not in record["pictures"]:
        return ""
    inside = Path(record["folder"], record["pictures"][kind])
    if inside.is_absolute() or ".." in inside.parts or inside.suffix != ".png":
        return ""
    path = epath.Path(record["root"]) / inside
    content = path.read_bytes() if is_inside(path, record["root"]) else b""
    return base64.b64encode(content).decode() if content.startswith(PNG) else ""


def provenance(lines: Sequence[Line]) -> str:
    """All that is known of each result, folded away."""
    items = []
    for line in lines:
        for record in line.records:
            known = {name: value for name, value in record.items() if name != "root"}
            head = escape(f"{line.title}, seed {record['seed']}")
            body = escape(json.dumps(known, indent=1))
            items.append(f"<details><summary>{head}</summary><pre>{body}</pre></details>")
    return "<h2>How the results were made</h2>\n" + "\n".join(items) if items else ""
