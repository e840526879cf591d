"""The table of docs/plan.md: the paper's recipes, compiled for TPU slices that are not attached.

    python -m benchmarks.plan --out=FILE [--only=REGEX] [--no-times]

A cell takes minutes to compile, a UNet's up to 90 and 10 GB; without times one minute, a UNet's
four. FILE gets a JSON line for each; cells that it has are skipped. `--table` prints Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from pathlib import Path

from condiff_jax.config.build import with_fields
from condiff_jax.runtime.process import compile_only

SLICES = ("v5e-64", "v5p-32", "v6e-32", "v4-32")
# Config files and their arguments, with the paper's batch sizes.
RECIPES = tuple(
    f"{data}_{side}:arch={arch}"
    for arch in ("ours", "unet")
    for side in (256, 512)
    for data in ("imagenet1k", "cc12m")
)
# First the recipes' own settings (remat `none` for UNets). Latents are cached, because libtpu takes
# a minute for a convolution of the autoencoder. The last one has the autoencoder in the step.
CHOICES = (
    {"model.remat": "block", "parallel.fsdp": 8, "data.name": "latents"},
    {"model.remat": "none", "parallel.fsdp": 8, "data.name": "latents"},
    {"model.remat": "dots", "parallel.fsdp": 8, "data.name": "latents"},
    {"model.remat": "block", "parallel.fsdp": 1, "data.name": "latents"},
    {"model.remat": "block", "parallel.fsdp": 8, "data.name": "tfds"},
)


def measure(recipe: str, changes: dict, name: str, *, times: bool) -> dict:
    """Compile one cell: the figures of the train step, with or without its time."""
    from condiff_jax.objectives.validate import create_config
    from condiff_jax.planning import plan, topology
    from configs import recipes

    data, side, arch = re.fullmatch(r"(\w+)_(\d+):arch=(\w+)", recipe).groups()
    values = with_fields(create_config(recipes.paper(arch, data, int(side))), changes)
    return plan.Planner(values, topology.parse(name)).train(complete=times)


def table(cells: list[dict]) -> str:
    """Markdown with a row for each cell."""
    rows = [
        "| recipe | slice | data | remat | fsdp | state GiB | total GiB | step s | sending s "
        "| images/s | MFU |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        gib, changes = cell["gib"], cell["changes"]
        state = sum(gib[name] for name in ("parameters", "average", "optimizer"))
        figures = [""] * 5
        if cell["fits"]:
            figures[0], figures[2] = f"{gib['total']:.1f}", f"{cell['sending_seconds']:.3f}"
        else:
            figures[0] = "does not fit"
        if "seconds" in cell:
            figures[1] = f"{cell['seconds']:.3f}"
            figures[3:] = f"{cell['images_per_sec']:.0f}", f"{cell['mfu']:.0%}"
        how = [changes[name] for name in ("data.name", "model.remat", "parallel.fsdp")]
        where = [cell["recipe"], cell["slice"], *how]
        rows.append("| " + " | ".join(map(str, [*where, f"{state:.1f}", *figures])) + " |")
    return "\n".join(rows)


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished child processes."""
    return sum(os.times()[:4])


def main() -> None:
    """Measure the missing cells, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="regular expression of the names of cells")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    cells = {}
    if arguments.out.exists():
        lines = map(json.loads, arguments.out.read_text().splitlines())
        cells = {cell["name"]: cell for cell in lines}  # the later line of a cell has times
    if arguments.table:
        print(table(list(cells.values())))
        return
    compile_only()
    for changes, recipe, place in itertools.product(CHOICES, RECIPES, SLICES):
        # UNets have no `dots`; scanned blocks fit nowhere without remat.
        if changes["model.remat"] == ("dots" if recipe.endswith("unet") else "none"):
            continue
        settings = " ".join(f"{field}={value}" for field, value in changes.items())
        name = f"{recipe} {place} {settings}"
        known = cells.get(name)
        done = known and (not arguments.times or "seconds" in known or not known["fits"])
        if done or not re.search(arguments.only, name):
            continue
        cell = {"name": name, "recipe": recipe, "slice": place, "changes": changes}
        start = cpu_seconds()
        cell |= measure(recipe, changes, place, times=arguments.times)
        cell["cpu_seconds"] = cpu_seconds() - start
        with arguments.out.open("a") as out:
            out.write(json.dumps(cell) + "\n")


if __name__ == "__main__":
    main()
