"""Building blocks of builders: units of work, and the samples that are read from them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from condiff_jax.data.tars import Member, members

BLOCK = 1 << 20  # bytes per read
CHUNK = 500  # single files or zip members per unit
# Errors from reading a damaged or missing file, or a member of a zip file.
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
IMAGE = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)


class SourceError(ValueError):
    """A source folder that does not have what its builder needs; the message is one line."""


class BoxesError(ValueError):
    """A file of boxes that cannot be read; the message is one line."""


class OutputError(ValueError):
    """A target folder that cannot be written to; the message is one line."""


@dataclass(frozen=True)
class Sample:
    """An encoded image; `original` is its (height, width) before any earlier downscaling."""

    key: str
    image: bytes
    caption: str = ""
    label: int = 0
    original: tuple[int, int] | None = None


@dataclass(frozen=True)
class Skip:
    """The name of a sample or file that is skipped, and the reason in a few words."""

    reason: str
    key: str


@dataclass(frozen=True)
class Unit:
    """A part of a source; `name` is unique, `size` in bytes, `mtime` of the newest file in ns."""

    name: str
    split: str
    size: int
    mtime: int

    def blocks(self) -> Iterator[bytes]:
        """Iterate over all bytes."""
        raise NotImplementedError

    def read(self) -> Iterator[Sample | Skip]:
        """Read the samples in a fixed order; damaged ones are a Skip. OSError if a file is gone."""
        raise NotImplementedError

    def metadata(self) -> str:
        """Hash of sample data that is not part of the bytes: labels, captions."""
        return ""

    def sha256(self) -> str:
        """Hash of all bytes."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """The content of a source in a fixed order; `classes` is empty if there are only captions."""

    units: list[Unit]
    classes: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Tar(Unit):
    """A tar, possibly nested in another: `size` bytes of `path` from `offset`."""

    path: Path
    offset: int = 0

    def blocks(self) -> Iterator[bytes]:
        yield from read_span(self.path, self.offset, self.size)

    def members(self) -> Iterator[Member | Skip]:
        """Iterate over complete files with safe names; a truncated tar adds one Skip at its end."""
        try:
            for member in members(self.path, self.offset, self.size):
                if unsafe(member.name):
                    yield Skip("unsafe path", text(member.name))
                elif member.whole:
                    yield member
        except tarfile.ReadError:
            yield Skip("truncated tar", self.name)


@dataclass(frozen=True)
class ClassTar(Tar):
    """A tar of images of one class; their key is the file name without extension."""

    label: int = 0
    caption: str = ""

    def metadata(self) -> str:
        return short_hash([self.label, self.caption])

    def read(self) -> Iterator[Sample | Skip]:
        with open(self.path, "rb") as file:
            for member in self.members():
                if isinstance(member, Skip):
                    yield member
                elif not IMAGE.search(member.name):
                    yield Skip("no image name", text(member.name))
                else:
                    image = os.pread(file.fileno(), member.size, member.offset)
                    yield Sample(stem(member.name), image, self.caption, self.label)


@dataclass(frozen=True)
class Item:
    """An image: `size` bytes of `path` from `offset`, or `member` of the zip file `path`."""

    key: str
    path: Path
    size: int
    offset: int = 0
    member: str = ""
    caption: str = ""
    label: int = 0


@dataclass(frozen=True)
class Items(Unit):
    """Single files or members of archives."""

    items: tuple[Item, ...]

    def metadata(self) -> str:
        return short_hash([[item.key, item.caption, item.label] for item in self.items])

    def load(self) -> Iterator[bytes | None]:
        """Read each item's bytes, or None if they cannot be read; OSError if the file is gone."""
        with contextlib.ExitStack() as stack:
            opened = functools.cache(lambda path: stack.enter_context(zipfile.ZipFile(path)))
            for item in self.items:
                try:
                    if item.member:
                        yield opened(item.path).read(item.member)
                    else:
                        yield b"".join(read_span(item.path, item.offset, item.size))
                except UNREADABLE:
                    # A missing source is an error; only damaged files are skipped.
                    if not item.path.exists():
                        raise
                    yield None

    def blocks(self) -> Iterator[bytes]:
        return filter(None, self.load())

    def read(self) -> Iterator[Sample | Skip]:
        for item, image in zip(self.items, self.load(), strict=True):
            if image is None:
                yield Skip("unreadable file", item.key)
            else:
                yield Sample(item.key, image, item.caption, item.label)


def chunks(name: str, split: str, items: Iterable[Item], mtime: int) -> list[Items]:
    """Split items into units of up to CHUNK items."""
    items = tuple(items)
    units = []
    for start in range(0, len(items), CHUNK):
        part = items[start : start + CHUNK]
        size = sum(item.size for item in part)
        units.append(Items(f"{name}[{start}:{start + len(part)}]", split, size, mtime, part))
    return units


def class_tars(split: str, tars: dict[str, Tar], captions: dict[str, str]) -> list[ClassTar]:
    """Make units of tars by class name; labels are indices of the sorted names in `captions`."""
    labels = {name: label for label, name in enumerate(sorted(captions))}
    return [
        ClassTar(**vars(tar) | {"split": split}, label=labels[name], caption=captions[name])
        for name, tar in sorted(tars.items())
    ]


def inner_tars(path: Path, pattern: str) -> tuple[dict[str, Tar], list[Skip]]:
    """Find the tars nested in a tar whose file names match `pattern`.

    Returns them by the pattern's group, and the skipped members.
    """
    outer = file_as_tar(path)
    tars = {}
    skipped = []
    for member in _all_members(path):
        if isinstance(member, Skip):
            skipped.append(member)
            continue
        file_name = stem(member.name, 0)
        match = re.fullmatch(pattern, file_name)
        if not match:
            skipped.append(Skip("wrong file name", text(member.name)))
        elif match[1] in tars:
            skipped.append(Skip("duplicate key", text(member.name)))
        else:
            size = min(member.size, outer.size - member.offset)
            name = f"{path.name}/{file_name}"
            tars[match[1]] = Tar(name, "", size, outer.mtime, path, member.offset)
    return tars, skipped


def _all_members(path: Path) -> Iterator[Member | Skip]:
    """Iterate as `Tar.members`, but keep a cut last member: truncated inner tars are usable."""
    try:
        for member in members(path):
            yield Skip("unsafe path", text(member.name)) if unsafe(member.name) else member
    except tarfile.ReadError:
        yield Skip("truncated tar", path.name)


def file_as_tar(path: Path, split: str = "", name: str = "", kind: type[Tar] = Tar) -> Tar:
    """Make a tar unit of a whole file."""
    stat = path.stat()
    return kind(name or path.name, split, stat.st_size, stat.st_mtime_ns, path)


def read_span(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """Read `size` bytes of a file from `offset`, or fewer if it ends before."""
    with open(path, "rb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            data = os.pread(file.fileno(), min(BLOCK, size - start), offset + start)
            if not data:
                return
            yield data


def require(source: Path, *names: str) -> Path:
    """Return the first of the names that exists in the source folder; SourceError if none does."""
    if not source.is_dir():
        raise SourceError(f"{source} is not a folder; give the one with {' or '.join(names)}")
    for name in names:
        if (source / name).exists():
            return source / name
    entries = sorted(path.name for path in source.iterdir())
    listing = ", ".join(entries[:5]) or "nothing"
    if len(entries) > 5:
        listing += ", ..."
    raise SourceError(f"{source} has no {' or '.join(names)}, only {listing}")


def files_below(top: Path) -> list[Path]:
    """List all files below a folder in order, following links to folders.

    OSError if a folder cannot be read.
    """

    def fail(error):
        raise error

    paths = []
    visited = set()
    for folder, subfolders, files in os.walk(top, onerror=fail, followlinks=True):
        subfolders.sort()
        real = os.path.realpath(folder)
        if real in visited:  # links can form a cycle
            subfolders.clear()
            continue
        visited.add(real)
        paths += [Path(folder, name) for name in files]
    return sorted(paths)


def short_hash(value) -> str:
    """Short SHA-256 of a JSON-serializable value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def unsafe(name: str) -> bool:
    """Whether a path in an archive or list points outside its folder."""
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)


def stem(name: str, cut: int = 1) -> str:
    """Return a path's file name without its last `cut` extensions."""
    return text(name.rsplit("/", 1)[-1].rsplit(".", cut)[0])


def text(value: str) -> str:
    """Replace lone surrogates, which UTF-8 cannot encode."""
    return value.encode("utf-8", errors="replace").decode()
