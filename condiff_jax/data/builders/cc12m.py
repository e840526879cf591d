"""CC12M, or any other captioned set, in webdataset tars as img2dataset writes them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from condiff_jax.data.builders.units import (
    Plan,
    Sample,
    Skip,
    SourceError,
    Tar,
    files_below,
    span_of,
    text,
    unsafe,
)
from condiff_jax.data.images import Encoded
from condiff_jax.data.splits import by_split
from condiff_jax.data.webdataset import IMAGE, JSON, TEXT, caption, is_tar, scan

SIDE = 1_000_000  # a side in pixels that no picture has


@dataclass(frozen=True)
class Captioned(Tar):
    """A tar of pictures beside their .txt or .json, see `webdataset`."""

    def read(self) -> Iterator[Sample | Skip]:
        """The samples."""
        rows, error = scan(self.path)
        if error:
            yield Skip("truncated tar", self.name)
        with open(self.path, "rb") as file:
            for key, spans, _ in rows:
                parts = [os.pread(file.fileno(), n, at) if n >= 0 else None for at, n in spans]
                key = text(key)
                if unsafe(key):
                    yield Skip("unsafe path", key)
                elif parts[IMAGE] is None:
                    yield Skip("no image", key)
                else:
                    image, words = parts[IMAGE], caption(parts[TEXT], parts[JSON])
                    original = original_size(image, parts[JSON])
                    yield Sample(key, image, words, original=original)


def original_size(image: bytes, details: bytes | None) -> tuple[int, int] | None:
    """(height, width) before img2dataset made the picture smaller, upright; None if unknown."""
    try:
        found = json.loads((details or b"").decode("utf-8", errors="replace"))
        size = tuple(found[f"original_{side}"] for side in ("height", "width"))
        if any(type(side) is not int or not 0 < side < SIDE for side in size):
            return None
        return size[::-1] if Encoded(image).transposed else size
    except Exception:  # damaged JSON or picture; the latter is found out when it is decoded
        return None


def cc12m(source: Path) -> Plan:
    """Tars by the split that their folder or name says, see `splits`; all train if none does."""
    files = files_below(source) if source.is_dir() else [source]
    tars = [path for path in files if is_tar(path) or path == source]
    gone = [Skip("missing file", path.name) for path in tars if not path.is_file()]
    tars = [path for path in tars if path.is_file()]
    if not tars:
        raise SourceError(f"{source} holds no *.tar; give the folder that img2dataset wrote")
    root = source if source.is_dir() else source.parent
    try:
        shards = by_split(root, (path.relative_to(root) for path in tars))
    except ValueError as error:
        raise SourceError(str(error)) from None
    units = [
        span_of(root / path, split, str(path), Captioned)
        for split in ("train", "validation")
        for path in shards.get(split, ())
    ]
    left_out = [Skip("wrong file name", path.name) for path in shards.get(None, ())]
    left_out += [Skip("test split", str(path)) for path in shards.get("test", ())]
    return Plan(units, skipped=tuple(gone + left_out))
