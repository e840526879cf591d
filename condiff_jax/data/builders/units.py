"""What a builder is made of: units of work, and the samples that are read from them."""

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

BLOCK = 1 << 20  # bytes read at a time
CHUNK = 500  # single files or members in one unit
# What reading a damaged or vanished file, or member of a zip file, raises.
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error)
IMAGE = re.compile(r"\.(jpe?g|png|webp)$", re.IGNORECASE)


class SourceError(ValueError):
    """A source folder that is not what its builder needs: one line that says what is missing."""


class BoxesError(ValueError):
    """A file of boxes that cannot be read: one line that says what it should be."""


class OutputError(ValueError):
    """A target folder that cannot be prepared into: one line that says why."""


@dataclass(frozen=True)
class Sample:
    """One picture as it came; `original` is its (height, width) before it was made smaller."""

    key: str
    image: bytes
    caption: str = ""
    label: int = 0
    original: tuple[int, int] | None = None


@dataclass(frozen=True)
class Skip:
    """Something that is left out, for a reason in a few words, with its name."""

    reason: str
    key: str


@dataclass(frozen=True)
class Unit:
    """A part of a source: `name` is unique, `size` in bytes, `mtime` in ns of the newest file."""

    name: str
    split: str
    size: int
    mtime: int

    def blocks(self) -> Iterator[bytes]:
        """All bytes."""
        raise NotImplementedError

    def read(self) -> Iterator[Sample | Skip]:
        """The samples in a fixed order; what is damaged is a Skip. OSError if the file is gone."""
        raise NotImplementedError

    def metadata(self) -> str:
        """A hash of what the samples get from elsewhere: labels, captions."""
        return ""

    def sha256(self) -> str:
        """Of all bytes."""
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """All that a source holds, in a fixed order. No classes: captions alone."""

    units: list[Unit]
    classes: tuple[str, ...] = ()
    skipped: tuple[Skip, ...] = ()


@dataclass(frozen=True)
class Tar(Unit):
    """A tar, maybe within another: `size` bytes of `path` from `offset` on."""

    path: Path
    offset: int = 0

    def blocks(self) -> Iterator[bytes]:
        """The tar's bytes."""
        yield from read_span(self.path, self.offset, self.size)

    def members(self) -> Iterator[Member | Skip]:
        """The whole files with a decent name; one Skip for the tar if it is truncated."""
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
    """A tar of pictures of one class."""

    label: int = 0
    caption: str = ""

    def metadata(self) -> str:
        """Of the class."""
        return short_hash([self.label, self.caption])

    def read(self) -> Iterator[Sample | Skip]:
        """Its pictures; their key is the file's name without extension."""
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
    """A picture that is `size` bytes of `path` from `offset` on, or `member` of a zip file."""

    key: str
    path: Path
    size: int
    offset: int = 0
    member: str = ""
    caption: str = ""
    label: int = 0


@dataclass(frozen=True)
class Items(Unit):
    """Single files, or members of an archive."""

    items: tuple[Item, ...]

    def metadata(self) -> str:
        """Of the items' keys, captions and labels."""
        return short_hash([[item.key, item.caption, item.label] for item in self.items])

    def load(self) -> Iterator[bytes | None]:
        """The bytes of each item, None where it cannot be read; OSError where it is gone."""
        with contextlib.ExitStack() as stack:
            opened = functools.cache(lambda path: stack.enter_context(zipfile.ZipFile(path)))
            for item in self.items:
                try:
                    if item.member:
                        yield opened(item.path).read(item.member)
                    else:
                        yield b"".join(read_span(item.path, item.offset, item.size))
                except UNREADABLE:
                    if not item.path.exists():  # a source that is gone, not a damaged file
                        raise
                    yield None

    def blocks(self) -> Iterator[bytes]:
        """The items' bytes, one after the other."""
        return filter(None, self.load())

    def read(self) -> Iterator[Sample | Skip]:
        """The items."""
        for item, image in zip(self.items, self.load(), strict=True):
            if image is None:
                yield Skip("unreadable file", item.key)
            else:
                yield Sample(item.key, image, item.caption, item.label)


def chunks(name: str, split: str, items: Iterable[Item], mtime: int) -> list[Items]:
    """Units of up to CHUNK items each."""
    items, units = tuple(items), []
    for start in range(0, len(items), CHUNK):
        part = items[start : start + CHUNK]
        size = sum(item.size for item in part)
        units.append(Items(f"{name}[{start}:{start + len(part)}]", split, size, mtime, part))
    return units


def class_tars(split: str, tars: dict[str, Tar], captions: dict[str, str]) -> list[ClassTar]:
    """Units of tars by class; labels count the classes in alphabetical order of `captions`."""
    labels = {name: label for label, name in enumerate(sorted(captions))}
    return [
        ClassTar(**vars(tar) | {"split": split}, label=labels[name], caption=captions[name])
        for name, tar in sorted(tars.items())
    ]


def inner_tars(path: Path, pattern: str) -> tuple[dict[str, Tar], list[Skip]]:
    """The tars within a tar whose file names match, by the pattern's group; and what is wrong."""
    whole, tars, skipped = span_of(path), {}, []
    for member in _all_members(path):
        found = None if isinstance(member, Skip) else re.fullmatch(pattern, stem(member.name, 0))
        if isinstance(member, Skip):
            skipped.append(member)
        elif not found:
            skipped.append(Skip("wrong file name", text(member.name)))
        elif found[1] in tars:
            skipped.append(Skip("duplicate key", text(member.name)))
        else:
            size = min(member.size, whole.size - member.offset)
            name = f"{path.name}/{stem(member.name, 0)}"
            tars[found[1]] = Tar(name, "", size, whole.mtime, path, member.offset)
    return tars, skipped


def _all_members(path: Path) -> Iterator[Member | Skip]:
    """As `Tar.members`, with the cut last one: an inner tar's beginning is of use."""
    try:
        for member in members(path):
            yield Skip("unsafe path", text(member.name)) if unsafe(member.name) else member
    except tarfile.ReadError:
        yield Skip("truncated tar", path.name)


def span_of(path: Path, split: str = "", name: str = "", kind: type[Tar] = Tar) -> Tar:
    """A whole file as a tar."""
    stat = path.stat()
    return kind(name or path.name, split, stat.st_size, stat.st_mtime_ns, path)


def read_span(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """Bytes of a file, less where it ends before."""
    with open(path, "rb", buffering=0) as file:
        for start in range(0, size, BLOCK):
            data = os.pread(file.fileno(), min(BLOCK, size - start), offset + start)
            if not data:
                return
            yield data


def need(source: Path, *names: str) -> Path:
    """The first of the names that the source folder has; SourceError if it has none of them."""
    if not source.is_dir():
        raise SourceError(f"{source} is no folder; give the one with {' or '.join(names)}")
    for name in names:
        if (source / name).exists():
            return source / name
    here = sorted(path.name for path in source.iterdir())
    found = ", ".join(here[:5]) + (", ..." if len(here) > 5 else "") if here else "nothing"
    raise SourceError(f"{source} has no {' or '.join(names)}, only {found}")


def files_below(top: Path) -> list[Path]:
    """All files of a folder and of those within, links to folders included, in order.

    OSError for a folder that cannot be read.
    """

    def fail(error):
        raise error

    found, seen = [], set()
    for folder, names, files in os.walk(top, onerror=fail, followlinks=True):
        names.sort()
        real = os.path.realpath(folder)
        if real in seen:  # links in a circle
            names.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in files]
    return sorted(found)


def short_hash(value) -> str:
    """Of anything that JSON can spell."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def unsafe(name: str) -> bool:
    """Whether a path within an archive or list leads out of its folder."""
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)


def stem(name: str, cut: int = 1) -> str:
    """A path's file name, without the last `cut` extensions."""
    return text(name.rsplit("/", 1)[-1].rsplit(".", cut)[0])


def text(value: str) -> str:
    """A string that UTF-8 can spell: without lone surrogates."""
    return value.encode("utf-8", errors="replace").decode()
