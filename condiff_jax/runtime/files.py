"""Files that are whole or not there, JSON lines, and arrays."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from condiff_jax.config.errors import one_line


def write(path: epath.Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old or the new one, never a part."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def append_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Add one line of JSON to a file; what a killed process left of a line is dropped first.

    Remote stores cannot append, there the file is rewritten.
    """
    line = json.dumps(value) + "\n"
    if "://" in os.fspath(path):
        text = path.read_text() if path.exists() else ""
        path.write_text(text[: text.rfind("\n") + 1] + line)
        return
    with open(path, "ab+") as file:  # writes go to the end, wherever one has read
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 1, 0))
        if end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(line.encode())


def read_json_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, if there is one; a torn last line is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()[: text.count("\n")]]


def drop_lines_after(path: epath.Path, step: int) -> None:
    """Drop the lines of a JSON-lines file beyond `step`: a resumed run writes them again."""
    values = read_json_lines(path)
    kept = [value for value in values if value["step"] <= step]
    if len(kept) != len(values):
        write(path, "".join(json.dumps(value) + "\n" for value in kept))


def load_cached(file: epath.Path, read: Callable[[bytes], Any]) -> Any:
    """What an evaluation has kept in a file; None where it has not, or the file is damaged."""
    if not file.exists():
        return None
    try:
        return read(file.read_bytes())
    except Exception as error:  # what broken files raise is not documented
        logging.warning("%s is damaged, and made again: %s", file, one_line(error))
        return None


def read_arrays(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of a .npz file, by name."""
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def write_arrays(file: epath.Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a .npz file, whole or not at all."""
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        write(file, buffer.getvalue())
