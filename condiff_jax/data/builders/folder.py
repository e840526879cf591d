"""Builder of images in folders, with captions.csv or captions.jsonl, or one folder per class.

Either layout may be at the top, or in folders of splits at the top, such as train and val.
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
COLUMNS = "file_name, caption and optionally label and split (train or val)"


class Row(NamedTuple):
    """An image file in the source."""

    split: str
    path: Path
    caption: str = ""
    class_name: str | None = None


def folder(source: Path) -> Plan:
    """Plan the images of all splits; labels are indices of class names in alphabetical order."""
    rows = []
    skipped = []
    for row in find(source):
        if isinstance(row, Skip):
            skipped.append(row)
        else:
            rows.append(row)
    classes = tuple(sorted({row.class_name for row in rows if row.class_name is not None}))
    labels = {name: label for label, name in enumerate(classes)}
    items = {}
    latest = 0  # modification time, ns
    for row in rows:
        key = text(row.path.relative_to(source).as_posix())
        if key in items:
            skipped.append(Skip("duplicate key", key))
        elif not os.path.isfile(row.path):  # also catches names that no file can have
            skipped.append(Skip("missing file", key))
        elif row.class_name is None and classes:
            skipped.append(Skip("no label", key))
        else:
            stat = row.path.stat()
            latest = max(latest, stat.st_mtime_ns)
            label = labels.get(row.class_name, 0)
            item = Item(key, row.path, stat.st_size, caption=row.caption, label=label)
            items[key] = row.split, item
    if not items:
        raise SourceError(
            f"{source} has no images; give a folder with class folders of .jpg, .png or .webp "
            f"files, or with a {' or '.join(LISTS)} that lists images"
        )
    units = []
    for split in ("train", "validation"):
        split_items = [item for item_split, item in items.values() if item_split == split]
        units += chunks(split, split, split_items, latest)
    return Plan(units, classes, tuple(skipped))


def find(source: Path) -> Iterator[Row | Skip]:
    """Iterate over the images of the split folders, or of the top if it has a list or no splits."""
    if not source.is_dir():
        raise SourceError(f"{source} is not a folder; builder folder needs one")
    folders = sorted(path for path in source.iterdir() if path.is_dir())
    roots = {path: split for path in folders if (split := split_of_folder(path.name))}
    if not roots or any((source / name).is_file() for name in LISTS):
        roots = {source: "train"}
    for root, split in roots.items():
        list_file = next((root / name for name in LISTS if (root / name).is_file()), None)
        for row in read_list(list_file, split) if list_file else walk(root, split):
            is_test = isinstance(row, Row) and row.split == "test"
            yield Skip("test split", text(str(row.path.relative_to(source)))) if is_test else row


def walk(root: Path, split: str) -> Iterator[Row | Skip]:
    """Iterate over the images in class folders, at any depth, in order of their names."""
    for path in files_below(root):
        relative = path.relative_to(root)
        if len(relative.parts) < 2:
            yield Skip("outside of class folders", text(str(relative)))
        elif not IMAGE.search(path.name):
            yield Skip("no image name", text(str(relative)))
        else:
            row_split = first_split(relative.parts[1:-1]) or split
            yield Row(row_split, path, class_name=text(relative.parts[0]))


def read_list(path: Path, split: str) -> Iterator[Row | Skip]:
    """Iterate over the images listed in captions.csv or captions.jsonl, relative to its folder."""
    readable = 0  # lines
    described = 0  # lines with a caption or label
    for number, line in enumerate(read_lines(path), 1):
        readable += bool(line)
        described += "caption" in line or "label" in line
        name = line.get("file_name")
        values = [line.get(column) for column in ("caption", "label", "split")]
        caption, label, split_name = values
        scalars = all(value is None or isinstance(value, str | int | float) for value in values)
        if not (name and isinstance(name, str) and scalars):
            yield Skip("bad line", f"{path.name}:{number}")
        elif unsafe(name):
            yield Skip("unsafe path", text(name))
        elif split_name not in (None, "") and not split_of_folder(str(split_name)):
            yield Skip("unknown split", text(name))
        else:
            caption = text(str("" if caption is None else caption)).strip()
            class_name = None if label in (None, "") else text(str(label))
            row_split = (
                split_of_folder(str(split_name or "")) or first_split(name.split("/")[:-1]) or split
            )
            yield Row(row_split, path.parent / name, caption, class_name)
    if readable and not described:
        raise SourceError(f"{path} has neither captions nor labels; it needs the columns {COLUMNS}")


def read_lines(path: Path) -> Iterator[dict]:
    """Iterate over the lines as {column: value}; {} for a line that cannot be read."""
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
            columns = lines.fieldnames or ()
            if "file_name" not in columns:
                names = ", ".join(map(repr, columns)) or "none"
                raise SourceError(
                    f"{path} has no column file_name but {names}; it needs the columns {COLUMNS}, "
                    "separated by commas, in UTF-8"
                )
            yield from lines
        except csv.Error as error:
            raise SourceError(f"{path}, line {lines.reader.line_num}: {error}") from error
