"""Results of sweeps and evaluations: read from files, grouped into rows of a report.

A table is a config module with ROWS (argument strings), PAPER (row -> published values) and NOTES.
A result is one JSON line: a row with a seed, what was measured, and how.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import flatten
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import read_json_lines

# Statuses of a finished row; a diverged one is a result too (the paper marks such runs).
FINISHED = ("done", "diverged")
# Intermediate values of a measure: recorded, but not shown by reports.
DETAIL = re.compile(r"sharpness_\d+")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text; columns are (group, name), and the first one has the row names."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """A row of a table with its results, one per seed, all measured in the same way."""

    row: str
    records: list[dict[str, Any]]
    changed: tuple[str, ...] = ()  # overrides "field=value" that other rows lack

    @property
    def title(self) -> str:
        """The row's arguments and its changed overrides."""
        title = self.row or "the only row"
        return f"{title} [{', '.join(self.changed)}]" if self.changed else title

    @property
    def done(self) -> list[dict[str, Any]]:
        """The results with measurements."""
        return [record for record in self.records if record["status"] == "done"]

    def values(self, metric: str) -> list[float]:
        """A metric's values, one for each seed that has it."""
        values = (record["metrics"].get(metric) for record in self.done)
        return [value for value in values if value is not None]


def metric_names(rows: Iterable[ResultRow]) -> list[str]:
    """Names of the measured metrics except DETAIL, in the order of the first results."""
    names = (name for row in rows for record in row.done for name in record["metrics"])
    return [name for name in dict.fromkeys(names) if not DETAIL.fullmatch(name)]


def load_table(path: str) -> dict[str, Any]:
    """Load a table's config file: its module; ConfigError if it has no rows or does not load."""
    if not path:
        raise ConfigError("--config", "missing; name a table, such as configs/table3.py")
    if not path.endswith(".py"):
        raise ConfigError(path, "is not a config file; try configs/table3.py")
    try:
        module = runpy.run_path(path)
    except Exception as error:  # the file can raise anything
        raise ConfigError(path, f"{type(error).__name__}: {error}") from error
    if not module.get("ROWS"):
        raise ConfigError(path, "is not a table: it has no ROWS")
    return module


def identify(record: dict[str, Any]) -> tuple:
    """The key of a result; of several results with the same key, the latest counts."""
    overrides = json.dumps(record.get("overrides", {}), sort_keys=True)
    return tuple(record[name] for name in ("table", "row", "seed", "scale")) + (overrides,)


def is_inside(path: epath.Path, folder: str | epath.Path) -> bool:
    """Whether the path is a regular file in the folder, not a link out of it or a pipe."""
    if "://" in os.fspath(path):
        return path.exists()
    # epath's `is_file` is true for pipes, and its `resolve` follows no links.
    file = Path(path)
    return file.is_file() and file.resolve().is_relative_to(Path(folder).resolve())


def checked(path: epath.Path) -> epath.Path:
    """Return the path; ConfigError if it exists and is not a regular file, see `is_inside`."""
    if path.exists() and not is_inside(path, path.parent):
        raise ConfigError(str(path), "not a regular file of its folder; copy it there")
    return path


def read_records(path: epath.Path, required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file or a .json list; skips an incomplete last line.

    ConfigError for other files, or if an object lacks a required name.
    """
    try:
        is_list = path.suffix == ".json"
        records = json.loads(path.read_text()) if is_list else read_json_lines(path)
        valid = all(isinstance(record, dict) and set(required) <= set(record) for record in records)
    except (ValueError, TypeError):
        valid = False
    if not valid:
        raise ConfigError(str(path), "not a file of results")
    return records


def without_root(record: Mapping[str, Any]) -> dict[str, Any]:
    """A result without "root", as it was in its file; see `read`."""
    return {name: value for name, value in record.items() if name != "root"}


def read(places: Iterable[str]) -> list[dict[str, Any]]:
    """Read results of sweeps' work directories (results*.jsonl) and files, one per `identify`.

    Each gets "root", the parent of its run's folder. Of several results of the same row the last
    one counts, but a failure never replaces a finished result.
    """
    latest: dict[tuple, dict] = {}
    for place in map(epath.Path, places):
        if not place.exists():
            raise ConfigError(str(place), "no such file or folder of results")
        is_folder = place.is_dir()
        paths = map(checked, sorted(place.glob("results*.jsonl"))) if is_folder else [place]
        for path in paths:
            for record in read_records(path, ("table", "row", "seed", "scale", "status")):
                key = identify(record)
                earlier = latest.get(key)
                if record["status"] in FINISHED or not earlier or earlier["status"] not in FINISHED:
                    latest[key] = {**record, "root": str(path.parent)}
    return list(latest.values())


def read_evaluations(place: str) -> list[dict[str, Any]]:
    """Read the evaluations of a run's work directory, or of a .json file written by --save.

    Each gets "root", the folder of its images. ConfigError if there are none.
    """
    path = epath.Path(place)
    if not path.exists():
        raise ConfigError(place, "is not a work directory or a .json of evaluations")
    records = read_records(checked(Workdir(place).evaluation) if path.is_dir() else path)
    # Autoencoders and classifiers write other records to this file.
    evaluations = [record for record in records if {"metrics", "sampling"} <= record.keys()]
    if not evaluations:
        raise ConfigError(place, "no evaluations here; run --mode=evaluate")
    return [record | {"root": place} for record in evaluations]


def settings(record: Mapping[str, Any]) -> dict[str, str]:
    """Settings of an evaluation that determine its numbers, except the seed: text by field."""
    values = {"step": record["step"], **record["sampling"], **record["evaluation"]}
    return {name: _text(value) for name, value in flatten(values).items() if name != "seed"}


def _text(value: Any) -> str:
    """A value without the separators of a row's arguments."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace(",", ";").replace("=", ":")


def group_evaluations(
    records: Sequence[Mapping[str, Any]],
) -> tuple[list[ResultRow], dict[str, str]]:
    """Group evaluations into a row for each combination of settings; also the common settings.

    Rows are named by the settings that vary. Of several evaluations with the same settings and seed
    the last one counts.
    """
    all_settings = [settings(record) for record in records]
    shared = set(all_settings[0].items()).intersection(*(fields.items() for fields in all_settings))
    common = {name: value for name, value in all_settings[0].items() if (name, value) in shared}
    by_row: dict[str, dict[int, dict]] = {}  # row -> seed -> record
    for record, fields in zip(records, all_settings, strict=True):
        row = ",".join(f"{name}={value}" for name, value in fields.items() if name not in common)
        seed = record["sampling"]["seed"]
        by_row.setdefault(row, {})[seed] = {
            **record, "seed": seed, "status": "done", "folder": ""
        }  # fmt: skip
    rows = [
        ResultRow(row, [by_seed[seed] for seed in sorted(by_seed)])
        for row, by_seed in by_row.items()
    ]
    return rows, common


def commit() -> str:
    """The git commit of this package's checkout, with -dirty if changed; "" without a checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        # An installed package may be in another project's checkout, which does not track it.
        for arguments in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            process = subprocess.run(
                git + arguments, env=environment, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return process.stdout.strip()


def provenance() -> dict[str, Any]:
    """The device, versions and commit of results measured by this process."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "numpy")},
        "commit": commit(),
    }
