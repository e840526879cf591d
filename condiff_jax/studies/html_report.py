"""A report as one HTML file without remote content: table, SVG figures, images, provenance."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from etils import epath
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from condiff_jax.studies.results import ResultRow, Table, is_inside, metric_names, without_root

# Titles of an evaluation's images by kind, in display order.
IMAGE_TITLES = {
    "sizes": "Same noise, different size control (the paper's Fig. 2)",
    "flip": "Same noise, without and with flip control (the paper's Fig. 6)",
    "grid": "Samples",
}
PNG = b"\x89PNG\r\n\x1a\n"  # the first bytes of every PNG file
# Colors for color-blind readers; curves also differ by markers and dashes.
SERIES = ("#0072b2", "#c04f00", "#007a5a", "#a3478a", "#806600", "#59626b")
MARKERS, DASHES = "os^DvP", ("-", "--", ":")
INK, SOFT, RULE, PAPER = "#1c2024", "#60676f", "#d9dde2", "#ffffff"
# Colors of the figures -> CSS variables of the page, which differ in dark mode.
VARIABLES = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)", PAPER: "var(--paper)"}
VARIABLES |= {color: f"var(--series-{i})" for i, color in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "condiff_jax",
    "text.parse_math": False,  # show a $ in a row's name as it is
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.facecolor": "none",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
    "lines.markeredgecolor": PAPER,
    "lines.markeredgewidth": 0.7,
    "lines.markersize": 5.5,
    "lines.linewidth": 1.8,
}


def render(table: Table, rows: Sequence[ResultRow]) -> str:
    """Render the page; `rows` are the results of the table, none for a computed table."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined,
        autoescape=True, trim_blocks=True,
    )  # fmt: skip
    groups = itertools.groupby(group for group, _ in table.columns)
    return environment.get_template("report.html.j2").render(
        table=table,
        groups=[(group, len(list(columns))) for group, columns in groups],
        figures=figures(rows),
        sections=image_sections(rows),
        provenance=[
            (caption(row, record), json.dumps(without_root(record), indent=1))
            for row in rows
            for record in row.records
        ],
    )


def caption(row: ResultRow, record: dict[str, Any]) -> str:
    """The row and the seed of a result."""
    return f"{row.title}, seed {record['seed']}"


def figures(rows: Sequence[ResultRow]) -> Iterator[tuple[str, Markup]]:
    """(caption, SVG) of each metric: curves over a numeric argument, else bars of several rows.

    Rows with different argument names are separate experiments with separate figures.
    """
    for metric in metric_names(rows):
        experiments: dict[tuple, list[ResultRow]] = {}
        for row in rows:
            if finite(row, metric):
                experiments.setdefault(tuple(arguments(row)), []).append(row)
        for experiment in experiments.values():
            axis = numeric_argument(experiment)
            name = f"{metric} over {axis}" if axis else metric
            if len(experiment) > 1:
                with matplotlib.rc_context(STYLE):
                    figure = curves(experiment, metric, axis) if axis else bars(experiment, metric)
                    svg = to_svg(figure, name)
                yield name, svg


def finite(row: ResultRow, metric: str) -> list[float]:
    """The finite values of a metric."""
    return [value for value in row.values(metric) if math.isfinite(value)]


def arguments(row: ResultRow) -> dict[str, str]:
    """The arguments "a=1,b=x" of a row as {"a": "1", "b": "x"}."""
    return dict(item.partition("=")[::2] for item in row.row.split(",") if item)


def numeric_argument(rows: Sequence[ResultRow]) -> str:
    """The argument with the most values, if they are three or more numbers; else ""."""
    values = {name: {arguments(row)[name] for row in rows} for name in arguments(rows[0])}
    numeric = [name for name in values if len(values[name]) > 2 and all(map(_number, values[name]))]
    return max(numeric, key=lambda name: len(values[name]), default="")


def _number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def bars(rows: Sequence[ResultRow], metric: str) -> Figure:
    """Horizontal bars from zero, each below its row's name, with a dot for each seed."""
    titles = [textwrap.fill(printable(row.title), 48) for row in rows]
    height = 0.26 + 0.16 * max(title.count("\n") + 1 for title in titles)  # inches of a row
    figure = Figure(figsize=(3.3, height * len(rows)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(0, color=RULE, zorder=0)
    for y, (row, title) in enumerate(zip(rows, titles, strict=True)):
        values = finite(row, metric)
        mean = sum(values) / len(values)
        offset = {"textcoords": "offset points"}
        axes.barh(y, mean, height=0.13 / height, color=SERIES[0], alpha=0.6)
        axes.plot(values, [y] * len(values), "o", color=INK)
        axes.annotate(title, (0, y), (0, 8), xycoords=axes.get_yaxis_transform(), **offset)
        axes.annotate(f"{mean:.4g}", (max(0, *values), y), (7, 0), va="center_baseline", **offset)
    return figure


def curves(rows: Sequence[ResultRow], metric: str, axis: str) -> Figure:
    """The metric over an argument: a labeled curve for each combination of the others."""
    common = set.intersection(*(set(arguments(row).items()) for row in rows))
    series: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        differing = [
            f"{k}={v}" for k, v in arguments(row).items() if k != axis and (k, v) not in common
        ]
        point = float(arguments(row)[axis]), finite(row, metric)
        series.setdefault(printable(", ".join([*differing, *row.changed])), []).append(point)
    figure = Figure(figsize=(2.9, 2))
    axes = figure.add_axes((0, 0, 1, 1))
    ends = []
    for number, (label, points) in enumerate(series.items()):
        color, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
        dash = DASHES[number // len(SERIES) % len(DASHES)]
        points.sort()
        means = [sum(values) / len(values) for _, values in points]
        axes.plot([x for x, _ in points], means, dash, color=color)
        seeds = [(x, value) for x, values in points for value in values]
        axes.plot(*zip(*seeds, strict=True), marker, color=color)
        ends.append((means[-1], label, color))
    positions = [x for points in series.values() for x, _ in points]
    axes.xaxis.set_major_locator(MaxNLocator(5))
    if min(positions) > 0 and max(positions) >= 10 * min(positions):
        axes.set_xscale("log")
        short = max(positions) <= 100 * min(positions)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel(printable(axis))
    ends.sort()
    bottom, top = axes.get_ylim()
    heights = spread([y for y, _, _ in ends], 0.09 * (top - bottom), top)
    for height, (_, label, color) in zip(heights, ends, strict=True):
        position = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(label, (1, height), (4, 0), color=color, va="center", **position)
    return figure


def spread(heights: Sequence[float], gap: float, top: float) -> list[float]:
    """Move sorted heights at least `gap` apart, none above `top`."""
    apart = list(itertools.accumulate(heights, lambda below, height: max(below + gap, height)))
    return [min(height, top - gap * i) for i, height in enumerate(reversed(apart))][::-1]


def printable(text: str) -> str:
    """Text of a row with a space after each comma, without characters invalid in XML."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return ", ".join(part.strip() for part in text.split(","))


def to_svg(figure: Figure, label: str) -> Markup:
    """A figure as an SVG element with the page's color variables; deterministic bytes."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", pad_inches=0.03, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    root.attrib |= {"role": "img", "aria-label": printable(label)}
    for element in root.iter():
        if element.tag.endswith("}g"):
            element.attrib.pop("id", None)  # figure_1 and so on repeat in every figure
        for color, variable in VARIABLES.items():
            if color in element.get("style", ""):
                element.set("style", element.get("style").replace(color, variable))
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def image_sections(rows: Sequence[ResultRow]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(title, [(caption, PNG in base64)]) of each kind of image; one per row, of its first seed."""
    kinds = [kind for row in rows for record in row.done for kind in record["pictures"]]
    for kind in dict.fromkeys([*IMAGE_TITLES, *kinds]):
        images = []
        for row in rows:
            embedded = [(caption(row, record), image(record, kind)) for record in row.done]
            images += [(name, png) for name, png in embedded if png][:1]
        if images:
            yield IMAGE_TITLES.get(kind, kind), images


def image(record: dict[str, Any], kind: str) -> str:
    """A PNG of a result in base64; "" if the file is missing, as for recorded results.

    Results may come from other people, so only PNG files inside the run's folder are read; links
    that lead out of it are not followed.
    """
    if kind not in record["pictures"]:
        return ""
    inside = Path(record["folder"], record["pictures"][kind])
    if inside.is_absolute() or ".." in inside.parts or inside.suffix != ".png":
        return ""
    path = epath.Path(record["root"]) / inside
    content = path.read_bytes() if is_inside(path, record["root"]) else b""
    return base64.b64encode(content).decode() if content.startswith(PNG) else ""
