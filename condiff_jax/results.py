"""Tables of the paper and their measured results: what `sweep` writes and `report` reads.

A table is a config module with ROWS (argument strings), PAPER (row -> published values) and NOTES.
A result is one JSON line: a row with a seed, what was measured, and how it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import jax
from etils import epath

from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.runtime.files import read_json_lines

# A row that was finished; a diverged one is a result too (the paper marks such runs).
FINISHED = ("done", "diverged")
# Parts of a measure: kept with the results, but not shown by reports.
DETAIL = re.compile(r"sharpness_\d+")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table to print: columns are (group, name), cells are text; the first column has names."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]
    notes: list[str]


@dataclasses.dataclass(frozen=True)
class Line:
    """A row of a table and its results (by seed), all made in the same way."""

    row: str
    records: list[dict[str, Any]]
    changed: tuple[str, ...] = ()  # overrides that not all lines of the table have, "field=value"

    @property
    def title(self) -> str:
        """The row, and what sets it apart from other lines of the same row."""
        return (self.row or "the only row") + (f" [{', '.join(self.changed)}]" * bool(self.changed))

    @property
    def done(self) -> list[dict[str, Any]]:
        """The results with measurements."""
        return [record for record in self.records if record["status"] == "done"]

    def values(self, name: str) -> list[float]:
        """A metric's values, one for each seed that has it."""
        values = (one["metrics"].get(name) for one in self.done)
        return [value for value in values if value is not None]


def measures(lines: Iterable[Line]) -> list[str]:
    """Names of what was measured, but for DETAIL, in the order of the first results."""
    names = (name for line in lines for record in line.done for name in record["metrics"])
    return [name for name in dict.fromkeys(names) if not DETAIL.fullmatch(name)]


def load_table(path: str) -> dict[str, Any]:
    """The names of a table's config file; ConfigError where it has no rows or does not load."""
    if not path.endswith(".py"):
        raise ConfigError(path, "is not a config file; try configs/table3.py")
    try:
        module = runpy.run_path(path)
    except Exception as error:  # whatever the file does
        raise ConfigError(path, f"{type(error).__name__}: {error}") from error
    if not module.get("ROWS"):
        raise ConfigError(path, "is not a table: it has no ROWS")
    return module


def table_name(path: str) -> str:
    """configs/table3.py -> table3."""
    return Path(path).stem


def identify(record: dict[str, Any]) -> tuple:
    """What two results must share for the later one to replace the earlier one."""
    overrides = json.dumps(record.get("overrides", {}), sort_keys=True)
    return tuple(record[name] for name in ("table", "row", "seed", "scale")) + (overrides,)


def load_json(path: epath.Path) -> list[dict[str, Any]]:
    """A JSON list of objects; ConfigError for a file that is something else."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise TypeError("not a list of objects")
    except (ValueError, TypeError) as error:
        raise ConfigError(str(path), f"not a file of results ({error!r})") from error
    return found


def is_inside(path: epath.Path, folder: str | epath.Path) -> bool:
    """Whether it is a regular file in the folder: no link out of it, no pipe that blocks."""
    if "://" in os.fspath(path):
        return path.exists()
    # Of epath's own, `is_file` is true for pipes and `resolve` follows no links.
    file = Path(path)
    return file.is_file() and file.resolve().is_relative_to(Path(folder).resolve())


def checked(path: epath.Path) -> epath.Path:
    """A file found in a folder; ConfigError where it is there, but not `is_inside`."""
    if path.exists() and not is_inside(path, path.parent):
        raise ConfigError(str(path), "not a regular file of its folder; copy it there")
    return path


def read_file(path: epath.Path) -> list[dict[str, Any]]:
    """The results in a JSON-lines file or a JSON list; a torn last line is left out.

    Raises ConfigError for a file that is something else.
    """
    try:
        whole = path.suffix == ".json"
        records = json.loads(path.read_text()) if whole else read_json_lines(path)
        for record in records:
            identify(record)
            record["status"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(path), f"not a file of results ({error!r})") from error
    return records


def read(places: Iterable[str]) -> list[dict[str, Any]]:
    """The results of folders (their results*.jsonl) and files, one for each `identify`.

    Each gets "root", the folder that its run's folder is in. Of several results of the same row
    the last counts, but none that failed replaces one that was finished.
    """
    latest: dict[tuple, dict] = {}
    for place in map(epath.Path, places):
        if not place.exists():
            raise ConfigError(str(place), "no such file or folder of results")
        inside = place.is_dir()
        for path in map(checked, sorted(place.glob("results*.jsonl"))) if inside else [place]:
            for record in read_file(path):
                key = identify(record)
                kept = latest.get(key)
                if record["status"] in FINISHED or not kept or kept["status"] not in FINISHED:
                    latest[key] = {**record, "root": str(path.parent)}
    return list(latest.values())


def commit() -> str:
    """The git commit of this package's checkout, with -dirty if it is changed; "" without one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        # An installed package may lie in some other project's checkout, which does not track it.
        for arguments in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        ):
            done = subprocess.run(
                git + arguments, env=environment, capture_output=True, text=True, check=True
            )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Device, versions and commit that results come from."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": {name: metadata.version(name) for name in ("jax", "flax", "numpy")},
        "commit": commit(),
    }


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError("arguments", f"{one_line(message)}; see --help")
