"""Atomic file writes, JSON lines and arrays, on local or remote (gs://) paths."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from condiff_jax.config.errors import one_line


@contextlib.contextmanager
def atomic_path(path: epath.Path) -> Iterator[epath.Path]:
    """Yield a temporary path that replaces `path` once the block has ended without an error."""
    temporary = path.parent / f"{path.name}.tmp"
    yield temporary
    temporary.replace(path)


def write_file(path: epath.Path, content: str | bytes) -> None:
    """Write a file atomically: readers see the old or the new content, never a part."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def append_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Append one JSON line to a file, dropping first what a killed process left of a line.

    Remote stores cannot append: there the file is rewritten.
    """
    line = json.dumps(value) + "\n"
    if "://" in os.fspath(path):
        text = path.read_text() if path.exists() else ""
        path.write_text(text[: text.rfind("\n") + 1] + line)
        return
    with open(path, "ab+") as file:  # append mode writes at the end, whatever the read position
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; [] without the file, and without a torn last line."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()[: text.count("\n")]]


def drop_lines_after(path: epath.Path, step: int) -> None:
    """Drop the lines of a JSON-lines file beyond `step`: a resumed run writes them again."""
    records = read_json_lines(path)
    remaining = [record for record in records if record["step"] <= step]
    if len(remaining) != len(records):
        write_file(path, "".join(json.dumps(record) + "\n" for record in remaining))


def load_cached(file: epath.Path, read: Callable[[bytes], Any]) -> Any:
    """Read a cache file with `read`; None where it is missing or damaged."""
    if not file.exists():
        return None
    try:
        return read(file.read_bytes())
    except Exception as error:  # which errors broken files raise is not documented
        logging.warning("%s is damaged and will be computed again: %s", file, one_line(error))
        return None


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """Read the arrays of a .npz file's bytes, by name."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def write_arrays(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file atomically."""
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        write_file(file, buffer.getvalue())
