"""Tables of the paper beside our numbers: `python -m condiff_jax.report configs/tableA1.py`."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm

from condiff_jax import config as config_lib
from condiff_jax import summary
from condiff_jax.system import create as create_system


def size_and_flop(config: config_lib.Config) -> tuple[float, float]:
    """(parameters in millions, forward GFLOP) of a config's denoiser; nothing is allocated."""
    found = summary.summarize(create_system(config, summary.vocabulary(config)))
    return found["parameters"] / 1e6, found["gflop_forward"]


# For each table: what it measures, and the headings of the values.
TABLES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "tableA1": (size_and_flop, ("parameters (M)", "forward GFLOP")),
}


def rows(module: dict, measure: Callable, names: Iterable[str]) -> list[tuple]:
    """(row, the paper's values, ours) for each of the table's rows."""
    out = []
    for row in tqdm(names, desc="rows", leave=False):
        config = config_lib.create(module["get_config"](row))
        out.append((row, module["PAPER"][row], measure(config)))
    return out


def markdown(table: list[tuple], headings: tuple[str, ...], notes: Iterable[str] = ()) -> str:
    """The table in Markdown: for each value paper | ours | difference."""
    titles = ["row"] + [f"{name}: {kind}" for name in headings for kind in ("paper", "ours", "")]
    lines = [" | ".join(titles), " | ".join(["---"] + ["--:"] * (len(titles) - 1))]
    for row, paper, ours in table:
        cells = [row.replace("arch=", "").replace("data=", "").replace("resolution=", "")]
        for theirs, value in zip(paper, ours, strict=True):
            cells += [f"{theirs:g}", f"{value:.2f}", f"{value / theirs - 1:+.1%}"]
        lines.append(" | ".join(cells))
    return "\n".join([*(f"| {line} |" for line in lines), "", *(f"- {note}" for note in notes)])


def main(argv: list[str]) -> int:
    """Print the table of a config file that has PAPER, its published numbers by row."""
    if len(argv) != 2 or not argv[1].endswith(".py"):
        print("error: usage: python -m condiff_jax.report configs/tableA1.py", file=sys.stderr)
        return 2
    name = argv[1].rsplit("/", 1)[-1].removesuffix(".py")
    if name not in TABLES:
        print(f"error: no report for {name}; choose from {', '.join(TABLES)}", file=sys.stderr)
        return 2
    measure, headings = TABLES[name]
    module = runpy.run_path(argv[1])
    print(markdown(rows(module, measure, module["ROWS"]), headings, module.get("NOTES", ())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
