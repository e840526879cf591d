"""Pictures in folders: captions.csv or captions.jsonl beside them, or one folder a class.

Either at the top, or in each of the folders of splits there, such as train and val.
"""

import csv
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from condiff_jax.data.builders.units import (
    IMAGE,
    Item,
    Plan,
    Skip,
    SourceError,
    chunks,
    files_below,
    text,
    unsafe,
)
from condiff_jax.data.splits import first_split, split_of_folder

LISTS = ("captions.csv", "captions.jsonl")
COLUMNS = "file_name, caption and, if wanted, label and split (train or val)"


class Row(NamedTuple):
    """A picture as it was found; `name` is its class, if any."""

    split: str
    path: Path
    caption: str = ""
    name: str | None = None


def folder(source: Path) -> Plan:
    """The pictures of all splits; labels count the classes' names in alphabetical order."""
    rows, skipped = [], []
    for row in find(source):
        (skipped if isinstance(row, Skip) else rows).append(row)
    classes = tuple(sorted({row.name for row in rows if row.name is not None}))
    labels = {name: label for label, name in enumerate(classes)}
    items, newest = {}, 0
    for row in rows:
        key = text(row.path.relative_to(source).as_posix())
        if key in items:
            skipped.append(Skip("duplicate key", key))
        elif not os.path.isfile(row.path):  # also for names that no file can have
            skipped.append(Skip("missing file", key))
        elif row.name is None and classes:
            skipped.append(Skip("no label", key))
        else:
            stat = row.path.stat()
            newest = max(newest, stat.st_mtime_ns)
            label = labels.get(row.name, 0)
            item = Item(key, row.path, stat.st_size, caption=row.caption, label=label)
            items[key] = row.split, item
    if not items:
        raise SourceError(
            f"{source} holds no pictures: neither folders of classes with .jpg, .png or .webp "
            f"files, nor a {' or '.join(LISTS)} that lists some"
        )
    units = []
    for split in ("train", "validation"):
        chosen = [item for where, item in items.values() if where == split]
        units += chunks(split, split, chosen, newest)
    return Plan(units, classes, tuple(skipped))


def find(source: Path) -> Iterator[Row | Skip]:
    """All rows of a list at the top or, without one, of the splits' folders or else of the top."""
    if not source.is_dir():
        raise SourceError(f"{source} is no folder; builder folder needs one")
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    parts = {path: split for path in folders if (split := split_of_folder(path.name))}
    if not parts or any((source / name).is_file() for name in LISTS):
        parts = {source: "train"}
    for top, split in parts.items():
        listed = next((top / name for name in LISTS if (top / name).is_file()), None)
        for row in read_list(listed, split) if listed else walk(top, split):
            is_test = isinstance(row, Row) and row.split == "test"
            yield Skip("test split", text(str(row.path.relative_to(source)))) if is_test else row


def walk(top: Path, split: str) -> Iterator[Row | Skip]:
    """The pictures in the folders of classes, however deep, in order of their names."""
    for path in files_below(top):
        inner = path.relative_to(top)
        if len(inner.parts) < 2:
            yield Skip("outside of class folders", text(str(inner)))
        elif not IMAGE.search(path.name):
            yield Skip("no image name", text(str(inner)))
        else:
            where = first_split(inner.parts[1:-1]) or split
            yield Row(where, path, name=text(inner.parts[0]))


def read_list(path: Path, split: str) -> Iterator[Row | Skip]:
    """The lines of captions.csv or captions.jsonl, whose pictures lie beside it."""
    described = lines = 0
    for number, line in enumerate(read_lines(path), 1):
        name, values = line.get("file_name"), [line.get(c) for c in ("caption", "label", "split")]
        described += "caption" in line or "label" in line
        lines += bool(line)
        plain = all(value is None or isinstance(value, str | int | float) for value in values)
        if not (name and isinstance(name, str) and plain):
            yield Skip("bad line", f"{path.name}:{number}")
        elif unsafe(name):
            yield Skip("unsafe path", text(name))
        elif values[2] not in (None, "") and not split_of_folder(str(values[2])):
            yield Skip("unknown split", text(name))
        else:
            caption, label, column = values
            words = text(str("" if caption is None else caption)).strip()
            known = None if label in (None, "") else text(str(label))
            where = split_of_folder(str(column or "")) or first_split(name.split("/")[:-1]) or split
            yield Row(where, path.parent / name, words, known)
    if lines and not described:
        raise SourceError(f"{path} has neither captions nor labels; its columns are {COLUMNS}")


def read_lines(path: Path) -> Iterator[dict]:
    """Each line by its columns, {} for one that cannot be read."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        if path.suffix == ".jsonl":
            for line in filter(str.strip, file):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = {}
                yield value if isinstance(value, dict) else {}
            return
        lines = csv.DictReader(file, skipinitialspace=True, strict=True)
        try:
            found = lines.fieldnames or ()
            if "file_name" not in found:
                raise SourceError(
                    f"{path} has no column file_name but {', '.join(map(repr, found)) or 'none'}; "
                    f"its columns are {COLUMNS}, separated by commas, in UTF-8"
                )
            yield from lines
        except csv.Error as error:
            raise SourceError(f"{path}, line {lines.reader.line_num}: {error}") from error
