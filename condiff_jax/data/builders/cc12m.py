"""Builder of CC12M, or any captioned data set in webdataset tars as written by img2dataset."""

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
    file_as_tar,
    files_below,
    text,
    unsafe,
)
from condiff_jax.data.images import Encoded
from condiff_jax.data.splits import by_split
from condiff_jax.data.webdataset import IMAGE, JSON, TEXT, caption, is_tar, scan

MAX_SIDE = 1_000_000  # pixels; larger original sizes are taken for bad metadata


@dataclass(frozen=True)
class Captioned(Tar):
    """A tar of images with their .txt or .json, see `webdataset`."""

    def read(self) -> Iterator[Sample | Skip]:
        rows, error = scan(self.path)
        if error:
            yield Skip("truncated tar", self.name)
        with open(self.path, "rb") as file:
            for key, spans, _ in rows:
                members = [
                    os.pread(file.fileno(), size, offset) if size >= 0 else None
                    for offset, size in spans
                ]
                key = text(key)
                image = members[IMAGE]
                if unsafe(key):
                    yield Skip("unsafe path", key)
                elif image is None:
                    yield Skip("no image", key)
                else:
                    original = original_size(image, members[JSON])
                    sample_caption = caption(members[TEXT], members[JSON])
                    yield Sample(key, image, sample_caption, original=original)


def original_size(image: bytes, details: bytes | None) -> tuple[int, int] | None:
    """Return the upright (height, width) before img2dataset's resizing, or None if unknown."""
    try:
        values = json.loads((details or b"").decode("utf-8", errors="replace"))
        size = tuple(values[f"original_{side}"] for side in ("height", "width"))
        if any(type(side) is not int or not 0 < side < MAX_SIDE for side in size):
            return None
        return size[::-1] if Encoded(image).transposed else size
    except Exception:  # damaged JSON, or a damaged image, which is skipped when it is decoded
        return None


def cc12m(source: Path) -> Plan:
    """Plan tars by the split that their path names, see `splits`; all are train if none does."""
    files = files_below(source) if source.is_dir() else [source]
    tars = [path for path in files if is_tar(path) or path == source]
    skipped = [Skip("missing file", path.name) for path in tars if not path.is_file()]
    tars = [path for path in tars if path.is_file()]
    if not tars:
        raise SourceError(f"{source} has no *.tar; give the folder that img2dataset wrote")
    root = source if source.is_dir() else source.parent
    try:
        shards = by_split(root, (path.relative_to(root) for path in tars))
    except ValueError as error:
        raise SourceError(str(error)) from None
    units = [
        file_as_tar(root / path, split, str(path), Captioned)
        for split in ("train", "validation")
        for path in shards.get(split, ())
    ]
    skipped += [Skip("wrong file name", path.name) for path in shards.get(None, ())]
    skipped += [Skip("test split", str(path)) for path in shards.get("test", ())]
    return Plan(units, skipped=tuple(skipped))
