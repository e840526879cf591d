r"""Mode `report`: the results of a sweep beside the published numbers, or those of one run.

    python -m condiff_jax.main --mode=report --config=configs/table3.py --workdir=runs/table3 \
      --html=table3.html
    python -m condiff_jax.main --mode=report --workdir=runs/guided --html=guided.html

The first command shows a table with results of mode sweep: those in --workdir and --results, by
default the recorded ones in benchmarks/results. Table A1 needs none: its values are computed. The
second command shows the evaluations of one run, such as over evaluation.grid. Instead of --workdir,
--results=FILE.json names a file written by --save.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.objectives import diffusion, summary
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.studies import html_report, results
from condiff_jax.studies.results import ResultRow, Table

EMPTY = "-"  # a cell without a value
MEAN = "mean over seeds ± half of their range."


def size_and_flop(config: Config) -> tuple[float, float]:
    """(parameters in millions, forward GFLOP) of a config's denoiser; nothing is allocated."""
    measures = summary.summarize(diffusion.create(config, load_vocabulary(config)))
    return measures["parameters"] / 1e6, measures["gflop_forward"]


# Tables with computed values, in the order of the paper's columns.
COMPUTED: dict[str, Callable] = {"tableA1": size_and_flop}


def computed_table(name: str, module: dict) -> Table:
    """A computed table: the paper's value, ours and the difference, for each column."""
    names = list(next(iter(module["PAPER"].values())))
    columns = [("", "row")]
    columns += [(name, kind) for name in names for kind in ("paper", "ours", "difference")]
    rows = []
    for row in tqdm(module["ROWS"], desc="rows", leave=False):
        values = COMPUTED[name](create_config(module["get_config"](row)))
        cells = [",".join(argument.partition("=")[2] for argument in row.split(","))]
        for paper, ours in zip(module["PAPER"][row].values(), values, strict=True):
            cells += [f"{paper:g}", f"{ours:.2f}", f"{ours / paper - 1:+.1%}"]
        rows.append(cells)
    return Table(title(name, module), columns, rows, list(module.get("NOTES", ())))


def title(name: str, module: dict) -> str:
    """First line of the module's docstring, or the table's name."""
    return (module.get("__doc__") or name).strip().split("\n")[0]


def aggregate(rows: Iterable[str], records: Iterable[dict[str, Any]]) -> list[ResultRow]:
    """Group results by row, scale, overrides and steps; a row without results has no records."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        overrides = json.dumps(record["overrides"], sort_keys=True)
        key = (record["row"], record["scale"], overrides, record["steps"])
        groups.setdefault(key, []).append(record)
    common = shared_overrides(groups.values())
    result_rows = []
    for row in rows:
        for group in [groups[key] for key in sorted(groups) if key[0] == row] or [[]]:
            changed = [text for text in shared_overrides([group]) if text not in common]
            by_seed = sorted(group, key=lambda record: record["seed"])
            result_rows.append(ResultRow(row, by_seed, tuple(changed)))
    return result_rows


def shared_overrides(groups: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    """The overrides "field=value" common to all groups; results of a group have equal ones."""
    overrides = [
        [f"{field}={value}" for field, value in group[0]["overrides"].items()]
        for group in groups
        if group
    ]
    return [text for text in overrides[0] if all(text in o for o in overrides)] if overrides else []


def results_table(heading: str, module: dict, rows: Sequence[ResultRow]) -> Table:
    """A table with groups of columns: published values, ours, and the provenance of ours.

    The published values are the paper's, or of the source that the module's SOURCE names.
    """
    source = module.get("SOURCE", "paper")
    paper = module["PAPER"]
    published = list(dict.fromkeys(name for values in paper.values() for name in values))
    measured = results.metric_names(rows)
    columns = [("", "row"), *((source, name) for name in published)]
    columns += [("ours", name) for name in measured]
    columns += [("provenance", name) for name in provenance(rows[0])]
    cells = [
        [
            row.title,
            *(published_cell(paper.get(row.row, {}).get(name)) for name in published),
            *(measured_cell(row, name) for name in measured),
            *provenance(row).values(),
        ]
        for row in rows
    ]
    cited = [
        f"Cited by the {source}, {name}: " + ", ".join(f"{key} {x:g}" for key, x in values.items())
        for name, values in module.get("CITED", {}).items()
    ]
    notes = [*remarks(published, measured, rows, source), *module.get("NOTES", ()), *cited]
    return Table(heading, columns, cells, notes)


def evaluations_table(place: str, rows: Sequence[ResultRow], common: dict[str, str]) -> Table:
    """A table of the evaluations of one run: a row for each combination of settings."""
    names = results.metric_names(rows)
    columns = [("", "setting"), *(("measured", name) for name in names), ("provenance", "seeds")]
    cells = [[row.title, *(measured_cell(row, n) for n in names), seeds_cell(row)] for row in rows]
    known = ", ".join(f"{name}={value}" for name, value in common.items() if value)
    notes = [f"All with {known}."] if known else []
    if any(len(row.done) > 1 for row in rows):
        notes.append(MEAN.capitalize())
    return Table(f"Evaluations of {Path(place).stem}", columns, cells, notes)


def published_cell(value: float | None) -> str:
    """A published value; NaN, the paper's cross, is "diverged"."""
    if value is None:
        return EMPTY
    return "diverged" if math.isnan(value) else f"{value:g}"


def measured_cell(row: ResultRow, name: str) -> str:
    """Mean over seeds ± half of their range, or the status if no seed is done."""
    values = row.values(name)
    if not values:
        return row.records[0]["status"] if row.records and not row.done else EMPTY
    spread = f" ± {(max(values) - min(values)) / 2:.2g}" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.4g}{spread}"


def seeds_cell(row: ResultRow) -> str:
    """The seeds, with the status of unfinished ones."""
    marks = {"done": "", "diverged": " diverged", "failed": " failed"}
    return ", ".join(f"{record['seed']}{marks[record['status']]}" for record in row.records)


def provenance(row: ResultRow) -> dict[str, str]:
    """Cells by column: where a row's results come from; different values separated by commas."""
    commits = [record.get("commit", "") for record in row.records]
    values = {
        "scale": [record["scale"] for record in row.records],
        "steps": [str(record["steps"]) for record in row.records],
        "run": [record["folder"].split("-")[-2] for record in row.records],  # the digest
        "device": [record.get("device", "") for record in row.records],
        "commit": [text[:7] + ("+" if text.endswith("-dirty") else "") for text in commits],
    }
    joined = {name: ", ".join(dict.fromkeys(texts)) for name, texts in values.items()}
    return {name: text or EMPTY for name, text in {"seeds": seeds_cell(row), **joined}.items()}


def remarks(
    published: Sequence[str], measured: Sequence[str], rows: Sequence[ResultRow], source: str
) -> list[str]:
    """Notes on comparability, the spread over seeds, and failures."""
    notes = []
    records = [record for row in rows for record in row.records]
    at_paper_scale = {record["scale"] for record in records} == {"paper"}
    if not records:
        notes.append("No results of ours yet; run --mode=sweep.")
    if measured and not (at_paper_scale and set(measured) <= set(published)):
        small = "" if at_paper_scale else " of smaller models on embedded data"
        notes.append(
            f"The {source}'s numbers and ours are not comparable: ours are other measures{small}. "
            "Compare rows within a column."
        )
    if any(len(row.done) > 1 for row in rows):
        notes.append(f"Ours: {MEAN}")
    if common := shared_overrides(row.records for row in rows):
        notes.append(f"All of ours with {', '.join(common)}.")
    for row in rows:
        for record in row.records:
            if record["status"] != "done":
                reason = f"{record['status']}: {record['reason']}"
                notes.append(f"{row.title}, seed {record['seed']} {reason}")
    return notes


def to_text(table: Table) -> str:
    """Format a table as text in aligned columns, each group's name above its first column."""
    headers = []
    for group, columns in itertools.groupby(table.columns, key=lambda column: column[0]):
        first, *rest = (name for _, name in columns)
        headers += [f"{group}\n{first}", *(f"\n{name}" for name in rest)]
    notes = [textwrap.fill(f"- {note}", 100, subsequent_indent="  ") for note in table.notes]
    return "\n".join([table.title, "", _aligned(headers, table.rows, "simple"), "", *notes])


def to_markdown(table: Table) -> str:
    """Format a table as Markdown, with the group in each heading."""
    headers = [f"{group}: {name}" if group else name for group, name in table.columns]
    headers, *rows = [[cell.replace("|", r"\|") for cell in row] for row in (headers, *table.rows)]
    return "\n".join([_aligned(headers, rows, "pipe"), "", *(f"- {note}" for note in table.notes)])


def _aligned(headers: list[str], rows: list[list[str]], style: str) -> str:
    alignment = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, style, colalign=alignment, disable_numparse=True)


def without_paths(record: dict[str, Any]) -> dict[str, Any]:
    """A result without the paths of this machine."""
    if "overrides" not in record:  # an evaluation
        return results.without_root(record)
    overrides = {
        field: Path(value).name if field.endswith("path") else value
        for field, value in record["overrides"].items()
    }
    return results.without_root(record) | {"overrides": overrides}


def table_report(path: str, places: Sequence[str]) -> tuple[Table, list[ResultRow], list[dict]]:
    """A table of the paper, its result rows, and their records."""
    module, name = results.load_table(path), Path(path).stem
    if "PAPER" not in module:
        raise ConfigError(path, "has no PAPER, the published values of its rows")
    if name in COMPUTED:
        return computed_table(name, module), [], []
    recorded = Path(path).parent.parent / "benchmarks" / "results" / f"{name}.json"
    records = [
        record
        for record in results.read(places or filter(Path.exists, [recorded]))
        if record["table"] == name and record["row"] in module["ROWS"]
    ]
    records.sort(key=lambda record: [str(part) for part in results.identify(record)])
    rows = aggregate(module["ROWS"], records)
    return results_table(title(name, module), module, rows), rows, records


def run_report(places: Sequence[str]) -> tuple[Table, list[ResultRow], list[dict]]:
    """A table of the evaluations of one run, its result rows, and their records."""
    if not places:
        raise ConfigError("--config", "missing; give a table, or --workdir of an evaluated run")
    if len(places) > 1:
        raise ConfigError("--results", "takes several places only with --config, a table")
    records = results.read_evaluations(places[0])
    rows, common = results.group_evaluations(records)
    return evaluations_table(places[0], rows, common), rows, records


def write(path: str, content: str) -> None:
    """Write a file and create its folder; ConfigError if that fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content.rstrip() + "\n", encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(path, error.strerror) from error


def run(
    workdir: str | None,
    *,
    table: str = "",
    results: Sequence[str] = (),
    html: str = "",
    markdown: str = "",
    save: str = "",
) -> None:
    """Report a table or a run's evaluations; the arguments are the flags of mode report.

    The table is printed unless it is written by --html or --markdown.
    """
    places = [workdir, *results] if workdir else list(results)
    if (places or save) and Path(table).stem in COMPUTED:
        raise ConfigError(table, "is computed: it takes no --workdir, --results or --save")
    shown, rows, records = table_report(table, places) if table else run_report(places)
    if html:
        write(html, html_report.render(shown, rows))
    if markdown:
        write(markdown, to_markdown(shown))
    if save:
        write(save, json.dumps([without_paths(record) for record in records], indent=1))
    if not html and not markdown:
        print(to_text(shown).rstrip())
