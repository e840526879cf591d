"""Tables of the paper beside our numbers: `python -m condiff_jax.report configs/tableA1.py`.

    python -m condiff_jax.report configs/table3.py --results runs/table3 --out=table3.html
    python -m condiff_jax.report runs/guided --out=guided.html

The results are those of `python -m condiff_jax.sweep`; without --results, the recorded ones in
benchmarks/results. Table A1 needs none: its values are computed. The last command shows what one
run's evaluations have measured, such as over evaluation.grid, and plots it.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from condiff_jax import evaluations, page, results
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.objectives import summary
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.results import Line, Table
from condiff_jax.runtime.process import fail

NONE = "-"  # a cell without a value


def size_and_flop(config: Config) -> tuple[float, float]:
    """(parameters in millions, forward GFLOP) of a config's denoiser; nothing is allocated."""
    found = summary.summarize(create_system(config, load_vocabulary(config)))
    return found["parameters"] / 1e6, found["gflop_forward"]


# Tables whose values are computed, not trained for; the values are in the order of the paper's.
COMPUTED: dict[str, Callable] = {"tableA1": size_and_flop}


def compute(name: str, module: dict) -> Table:
    """A computed table: for each value the paper's, ours, and the difference."""
    rows = []
    for row in tqdm(module["ROWS"], desc="rows", leave=False):
        ours = COMPUTED[name](create_config(module["get_config"](row)))
        rows.append((row, module["PAPER"][row], ours))
    return compare(title(name, module), rows, module.get("NOTES", ()))


def compare(heading: str, rows: Sequence[tuple], notes: Iterable[str] = ()) -> Table:
    """Table of (row, {name: the paper's value}, ours in the same order)."""
    names = list(rows[0][1])
    columns = [("", "row")]
    columns += [(name, kind) for name in names for kind in ("paper", "ours", "difference")]
    cells = []
    for row, paper, ours in rows:
        line = [row.replace("arch=", "").replace("data=", "").replace("resolution=", "")]
        for theirs, value in zip(paper.values(), ours, strict=True):
            line += [f"{theirs:g}", f"{value:.2f}", f"{value / theirs - 1:+.1%}"]
        cells.append(line)
    return Table(heading, columns, cells, list(notes))


def title(name: str, module: dict) -> str:
    """First sentence of the module's docstring, or the table's name."""
    return (module.get("__doc__") or name).strip().split("\n")[0]


def aggregate(rows: Iterable[str], records: Iterable[dict[str, Any]]) -> list[Line]:
    """The results of each row: a line for each scale, overrides and length, all seeds in it.

    A row without results gets a line without records.
    """
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        overrides = json.dumps(record["overrides"], sort_keys=True)
        key = (record["row"], record["scale"], overrides, record["steps"])
        groups.setdefault(key, []).append(record)
    lines = []
    common = set(shared(groups.values()))
    for row in rows:
        found = [groups[key] for key in sorted(groups) if key[0] == row]
        for group in found or [[]]:
            changed = tuple(one for one in shared([group]) if one not in common)
            lines.append(Line(row, sorted(group, key=lambda record: record["seed"]), changed))
    return lines


def shared(groups: Iterable[Sequence[dict[str, Any]]]) -> list[str]:
    """The overrides "field=value" that all groups of results have."""
    each = [
        [f"{field}={value}" for field, value in group[0]["overrides"].items()]
        for group in groups
        if group
    ]
    return [one for one in each[0] if all(one in some for some in each)] if each else []


def tabulate(heading: str, module: dict, lines: Sequence[Line]) -> Table:
    """The published values and ours, in groups of columns of their own, and where ours are from.

    Published by the paper, or by what the module's SOURCE names.
    """
    source = module.get("SOURCE", "paper")
    paper = unique(name for values in module["PAPER"].values() for name in values)
    ours = results.measures(lines)
    columns = [
        ("", "row"),
        *((source, name) for name in paper),
        *(("ours", name) for name in ours),
    ]
    columns += [("provenance", name) for name in PROVENANCE]
    rows = []
    for line in lines:
        values = module["PAPER"].get(line.row, {})
        cells = [line.title, *(published(values.get(name)) for name in paper)]
        cells += [measured(line, name) for name in ours]
        rows.append(cells + [PROVENANCE[name](line) for name in PROVENANCE])
    cited = [
        f"Cited by the {source}, {name}: " + ", ".join(f"{key} {x:g}" for key, x in values.items())
        for name, values in module.get("CITED", {}).items()
    ]
    notes = [*remarks(paper, ours, lines, source), *module.get("NOTES", ()), *cited]
    return Table(heading, columns, rows, notes)


def tabulate_run(place: str, lines: Sequence[Line], common: dict[str, str]) -> Table:
    """The evaluations of one run: a row for each setting, and what all have in common."""
    names = results.measures(lines)
    columns = [("", "setting"), *(("", name) for name in names), ("", "seeds")]
    rows = [[line.title, *(measured(line, name) for name in names), _seeds(line)] for line in lines]
    known = ", ".join(f"{name}={value}" for name, value in common.items() if value)
    notes = [f"All with {known}."] if known else []
    if any(len(line.done) > 1 for line in lines):
        notes.append("Mean over seeds ± half of their range.")
    return Table(f"Evaluations of {Path(place).stem}", columns, rows, notes)


def published(value: float | None) -> str:
    """A cell of the paper; NaN is its cross."""
    if value is None:
        return NONE
    return "diverged" if math.isnan(value) else f"{value:g}"


def measured(line: Line, name: str) -> str:
    """Mean over seeds, with half of their range; what went wrong where no seed was finished."""
    values = line.values(name)
    if not values:
        return line.records[0]["status"] if line.records and not line.done else NONE
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:.4g}" + (f" ± {spread:.2g}" if len(values) > 1 else "")


def _seeds(line: Line) -> str:
    marks = {"done": "", "diverged": " diverged", "failed": " failed"}
    return ", ".join(f"{one['seed']}{marks[one['status']]}" for one in line.records)


def _each(name: str) -> Callable[[Line], str]:
    return lambda line: ", ".join(unique(str(record.get(name, "")) for record in line.records))


def _runs(line: Line) -> str:
    """Kinship and steps at the end of the folders' names, which tell the runs apart."""
    return ", ".join(unique(record["folder"].split("-")[-2] for record in line.records))


def _commits(line: Line) -> str:
    """Seven digits of the commits; a + for changes that were not committed."""
    found = (record.get("commit", "") for record in line.records)
    return ", ".join(unique(f"{one[:7]}{'+' * one.endswith('-dirty')}" for one in found))


# Name of a column -> its cell for a line, NONE where it is empty.
PROVENANCE: dict[str, Callable[[Line], str]] = {
    name: lambda line, cell=cell: cell(line) or NONE
    for name, cell in {
        "seeds": _seeds,
        "scale": _each("scale"),
        "steps": _each("steps"),
        "run": _runs,
        "device": _each("device"),
        "commit": _commits,
    }.items()
}


def remarks(
    paper: Sequence[str], ours: Sequence[str], lines: Sequence[Line], source: str = "paper"
) -> list[str]:
    """What a reader must know before comparing: measures, spread, what went wrong."""
    out = []
    scales = {record["scale"] for line in lines for record in line.records}
    if not any(line.records for line in lines):
        out.append("No results of ours yet: python -m condiff_jax.sweep makes them.")
    if ours and (scales != {"paper"} or not set(ours) <= set(paper)):
        small = "" if scales == {"paper"} else " of smaller models on embedded data"
        out.append(
            f"The {source}'s numbers and ours are not comparable: ours are other measures{small}. "
            "Compare rows within a column."
        )
    if any(len(line.done) > 1 for line in lines):
        out.append("Ours: mean over seeds ± half of their range.")
    if common := shared(line.records for line in lines):
        out.append(f"All of ours with {', '.join(common)}.")
    for line in lines:
        for record in line.records:
            if record["status"] != "done":
                reason = f"{record['status']}: {record['reason']}"
                out.append(f"{line.title}, seed {record['seed']} {reason}")
    return out


def unique(values: Iterable) -> list:
    """Each value once, in the order of appearance."""
    return list(dict.fromkeys(values))


def text(table: Table) -> str:
    """The table in aligned columns, the first to the left."""
    groups = [group if group != before else "" for group, before in _with_previous(table)]
    names = [name for _, name in table.columns]
    lines = [names, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for i, group in enumerate(groups):  # a group's name may reach over its other columns
        span = next((j for j in range(i + 1, len(groups)) if groups[j]), len(groups))
        missing = len(group) - sum(widths[i:span]) - 2 * (span - i - 1)
        widths[i] += max(missing, 0)
    head = ""
    for i, group in enumerate(groups):
        if group:
            head = head.ljust(sum(widths[:i]) + 2 * i) + group
    body = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "  ".join("-" * width for width in widths)
    notes = [textwrap.fill(f"- {note}", 100, subsequent_indent="  ") for note in table.notes]
    head = [head] if head.strip() else []
    return "\n".join([table.title, "", *head, body[0], rule, *body[1:], "", *notes])


def _with_previous(table: Table) -> Iterable[tuple[str, str]]:
    groups = [group for group, _ in table.columns]
    return zip(groups, ["", *groups], strict=False)


def markdown(table: Table) -> str:
    """The table in Markdown, with the group in each heading."""
    heads = [f"{group}: {name}" if group else name for group, name in table.columns]
    lines = [heads, ["---"] + ["--:"] * (len(heads) - 1), *table.rows]
    cells = [" | ".join(cell.replace("|", r"\|") for cell in line) for line in lines]
    return "\n".join([*(f"| {line} |" for line in cells), "", *(f"- {n}" for n in table.notes)])


def recorded(records: Iterable[dict[str, Any]]) -> str:
    """Results as JSON for --save: sorted, without the paths of the machine."""
    kept = []
    for record in records:
        record = {name: value for name, value in record.items() if name != "root"}
        record["overrides"] = {
            field: Path(value).name if field.endswith("path") else value
            for field, value in record["overrides"].items()
        }
        kept.append(record)
    kept.sort(key=lambda record: [str(part) for part in results.identify(record)])
    return json.dumps(kept, indent=1, sort_keys=True) + "\n"


def parse(argv: Sequence[str]):
    """The command line; `format` follows the end of --out's name if it is not given."""
    parser = results.Parser("python -m condiff_jax.report", description=__doc__)
    parser.add_argument(
        "table",
        help="config file with PAPER, such as configs/tableA1.py; or a work directory, or .json",
    )
    parser.add_argument(
        "--results",
        nargs="+",
        action="extend",
        metavar="PLACE",
        help="work directories of sweeps, .jsonl or saved .json files",
    )
    parser.add_argument("--format", choices=("text", "markdown", "html"))
    parser.add_argument("--out", default="", help="file to write; default: print")
    parser.add_argument("--save", default="", help="file to record the results that are used")
    args = parser.parse_args(argv)
    ends = {".md": "markdown", ".html": "html", ".htm": "html"}
    args.format = args.format or ends.get(Path(args.out).suffix, "text")
    return args


def run(argv: Sequence[str]) -> None:
    """Make the report that the arguments ask for; ConfigError if they are bad."""
    args = parse(argv)
    if not args.table.endswith(".py"):
        return run_evaluations(args)
    module, name = results.load_table(args.table), results.table_name(args.table)
    if "PAPER" not in module:
        raise ConfigError(args.table, "has no PAPER, the published values of its rows")
    if name in COMPUTED:
        if args.results or args.save:
            raise ConfigError(
                args.table,
                f"{name} is computed: it takes no --results and no --save",
            )
        table, lines = compute(name, module), []
    else:
        saved = Path(args.table).parent.parent / "benchmarks" / "results" / f"{name}.json"
        places = args.results or ([str(saved)] if saved.exists() else [])
        records = [
            record
            for record in results.read(places)
            if record["table"] == name and record["row"] in module["ROWS"]
        ]
        lines = aggregate(module["ROWS"], records)
        table = tabulate(title(name, module), module, lines)
        if args.save:
            write(args.save, recorded(records))
    publish(args, table, lines)


def run_evaluations(args) -> None:
    """The report of one run's evaluations."""
    if args.results:
        raise ConfigError("--results", f"{args.table} is no table and takes none")
    records = evaluations.read(args.table)
    lines, common = evaluations.lines(records)
    publish(args, tabulate_run(args.table, lines, common), lines)
    if args.save:
        kept = [{name: one[name] for name in one if name != "root"} for one in records]
        write(args.save, json.dumps(kept, indent=1) + "\n")


def publish(args, table: Table, lines: Sequence[Line]) -> None:
    """Write or print a report in its format."""
    render = {"text": text, "markdown": markdown, "html": lambda table: page.html(table, lines)}
    content = render[args.format](table).rstrip("\n") + "\n"
    if args.out:
        write(args.out, content)
    else:
        print(content, end="")


def write(path: str, content: str) -> None:
    """Write a file, with its folder; ConfigError where that fails."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise ConfigError(path, error.strerror) from error


def main(argv: Sequence[str]) -> int:
    """`run`, with errors in one line and exit code 2."""
    try:
        run(argv)
    except ConfigError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
