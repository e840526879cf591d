"""Random access to samples in webdataset tar shards, without unpacking them."""

import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import uuid
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from absl import logging

from condiff_jax.data.images import Encoded
from condiff_jax.data.records import Records
from condiff_jax.data.splits import by_split, split_of
from condiff_jax.data.tars import members

SPLITS = ("train", "validation")
IMAGE, TEXT, JSON = range(3)  # columns of Index.spans
COLUMNS = {"png": IMAGE, "jpg": IMAGE, "jpeg": IMAGE, "webp": IMAGE, "txt": TEXT, "json": JSON}
VERSION = 1  # of the index; increase it if its fields or their meaning change


@dataclass(frozen=True)
class Index:
    """Positions of n samples: keys (n,) in UTF-8, shards (n,), spans (n, 3, 2), labels (n,)."""

    keys: np.ndarray
    shards: np.ndarray
    spans: np.ndarray  # offset and size in bytes of image, text and JSON; size -1 if absent
    labels: np.ndarray


class Webdataset(Records):
    """One split of a folder of tar shards, or of a single tar.

    Members of a shard with the same key (the path up to the first dot of the file name) form a
    sample; a repeated (key, extension) starts a new one. Samples without .cls have label 0.
    `classes` are the labels up to the largest of the split: "0", "1", ...
    """

    def __init__(self, path, split: str = "train", cache=None):
        """Index the shards, or load the index from the folder `cache`.

        ValueError or FileNotFoundError if the shards cannot be read.
        """
        self.path = Path(path)
        self.split = split
        self._shards = find_shards(self.path, split)
        self._index = load_or_build(self._shards, split, cache)
        if not len(self._index.keys):
            raise ValueError(f"{self.path} has no {split} samples; are its tar shards empty?")
        self.classes = tuple(str(i) for i in range(int(self._index.labels.max()) + 1))
        super().__init__()

    def _reset(self):
        super()._reset()
        # Bounded, as large data sets have more shards than a process may have open files.
        self._open = functools.lru_cache(maxsize=256)(_Shard)

    def __len__(self):
        return len(self._index.keys)

    def _member(self, i: int, column: int) -> bytes | None:
        offset, size = self._index.spans[i, column].tolist()
        shard = self._shards[self._index.shards[i]]
        return self._open(shard).read(offset, size) if size >= 0 else None

    def _record(self, i: int) -> dict:
        data = self._member(i, IMAGE)
        if data is None:
            raise ValueError("it has no image")
        label = self._index.labels[i]
        return {"image": Encoded(data), "caption": self._caption(i), "label": label}

    def _where(self, i: int) -> str:
        return f"{self._index.keys[i].decode()} of {self._shards[self._index.shards[i]]}"

    def _caption(self, i: int) -> str:
        return caption(self._member(i, TEXT), self._member(i, JSON))


class _Shard:
    """An open file for positioned reads, closed when it is garbage collected."""

    def __init__(self, path: Path):
        self._fd = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        # pread uses no file position, so threads and forked processes can share the descriptor.
        return os.pread(self._fd, size, offset)

    def __del__(self):
        if hasattr(self, "_fd"):
            os.close(self._fd)


def find_shards(path: Path, split: str) -> list[Path]:
    """Return a split's tar shards, see `splits`, in a folder and its subfolders named by split.

    ValueError or FileNotFoundError if the folder or a file name is bad.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a folder of tar shards or a tar file")
    root = path if path.is_dir() else path.parent
    shards = by_split(root, (p.relative_to(root) for p in tar_files(path)))
    if not shards:
        raise FileNotFoundError(f"{path} has no *.tar shards; give the folder that contains them")
    if unnamed := shards.get(None):
        raise ValueError(
            f"{root / unnamed[0]} names no split, but other shards do; rename it, for example to "
            f"train-{unnamed[0].name}, or move it away"
        )
    if split not in shards:
        raise ValueError(f"{path} has no {split} shards, only {', '.join(shards)}")
    if "test" in shards:
        logging.warning("%d test shards of %s are ignored", len(shards["test"]), path)
    # Resolved last, as the links in a Hugging Face cache point to files whose names are hashes.
    return [(root / shard).resolve() for shard in shards[split]]


def tar_files(path: Path) -> list[Path]:
    """Return the file itself, or the tars in a folder and in its subfolders that name a split."""
    if not path.is_dir():
        return [path]
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] != ".")
    nested = [p for folder in folders for p in sorted(folder.iterdir())]
    tars = [p for p in sorted(path.iterdir()) + nested if is_tar(p)]
    return [p for p in tars if p.parent == path or split_of(f"{p.parent.name}/shard.tar")]


def is_tar(path: Path) -> bool:
    """Whether a file name ends in .tar, in any case."""
    return path.suffix.lower() == ".tar"


def load_or_build(shards: list[Path], split: str, cache=None) -> Index:
    """Load the shards' index from the first cache folder that has it, or build and store it."""
    stats = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in shards]
    digest = hashlib.sha256(json.dumps([VERSION, stats]).encode()).hexdigest()[:16]
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [shards[0].parent, user_cache / "condiff_jax"] if cache is None else [Path(cache)]
    files = [folder / f".index-{split}-{digest}.npz" for folder in folders]
    for file in files:
        try:
            with np.load(file, allow_pickle=False) as data:
                return Index(**{field.name: data[field.name] for field in fields(Index)})
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            continue  # missing or damaged
    index = build(shards)
    if not any(save(index, file) for file in files):
        logging.warning("cannot store the index of %s in %s", shards[0].parent, folders[-1])
    return index


def save(index: Index, file: Path) -> bool:
    """Write the index atomically; return whether that succeeded."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Root can write to any folder, but a read-only one should stay as it is.
        if not file.parent.stat().st_mode & 0o222:
            return False
        with open(partial, "xb") as out:
            np.savez(out, **vars(index))
        os.replace(partial, file)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        return False


def build(shards: list[Path]) -> Index:
    """Build the index from all tar headers and labels; ValueError names a damaged shard."""
    rows = []
    for number, path in enumerate(shards):
        shard_rows, error = scan(path)
        if error:
            raise ValueError(
                f"{path} is truncated or not an uncompressed tar ({error}); download it again"
            )
        rows += [(number, *row) for row in shard_rows]
    return Index(
        keys=np.array([key.encode("utf-8", "replace") for _, key, _, _ in rows], np.bytes_),
        shards=np.array([number for number, _, _, _ in rows], np.int32),
        spans=np.array([spans for _, _, spans, _ in rows], np.int64).reshape(-1, 3, 2),
        labels=np.array([label for _, _, _, label in rows], np.int32),
    )


def scan(path: Path) -> tuple[list[list], tarfile.ReadError | None]:
    """List one shard's samples in order: [key, three (offset, size) spans, label].

    Also returns the error that ended reading before the end of the shard, or None.
    """
    rows = []
    latest = {}  # key -> its last row, and the extensions which that row has so far
    try:
        with open(path, "rb") as file:
            for member in members(path):
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key, extension = f"{folder}/{stem}".lstrip("/"), extension.lower()
                if not (member.whole and stem and extension in (*COLUMNS, "cls")):
                    continue
                row, extensions = latest.get(key, (None, {extension}))
                if extension in extensions:
                    row, extensions = latest[key] = [key, [(0, -1)] * 3, 0], set()
                    rows.append(row)
                extensions.add(extension)
                if extension == "cls":
                    text = os.pread(file.fileno(), member.size, member.offset).strip()
                    row[2] = int(text) if re.fullmatch(rb"\d{1,9}", text) else 0  # int32
                else:
                    row[1][COLUMNS[extension]] = (member.offset, member.size)
    except tarfile.ReadError as error:
        return rows, error
    return rows, None


def caption(text: bytes | None, details: bytes | None) -> str:
    """Return the caption from a sample's text, or else from its JSON, or else an empty string."""
    if text is not None:
        return text.decode("utf-8", errors="replace").strip()
    try:
        values = json.loads((details or b"").decode("utf-8", errors="replace"))
        # JSON can contain lone surrogates, which UTF-8 cannot encode.
        return values["caption"].strip().encode("utf-8", errors="replace").decode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""
