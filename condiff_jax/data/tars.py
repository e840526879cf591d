"""The members of plain tar files, of tars within tars, and of what is left of truncated ones."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """A regular file of a tar: its bytes are `size` from `offset` of the outermost file on."""

    name: str
    offset: int
    size: int
    whole: bool  # False where the tar ends before it does


class Span(io.RawIOBase):
    """`size` bytes of an open file from `offset` on, as a file."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._fd, self._offset, self._size, self._at = descriptor, offset, size, 0

    def readable(self):
        """True."""
        return True

    def seekable(self):
        """True."""
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = start + position
        return self._at

    def readinto(self, buffer) -> int:
        """As of any file."""
        size = max(0, min(len(buffer), self._size - self._at))
        data = os.pread(self._fd, size, self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def members(path: Path, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """The regular files of the tar that begins at `offset` of a file and has `size` bytes.

    tarfile.ReadError after the last readable one when the tar is truncated, damaged or compressed.
    """
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - offset
        size = left if size is None else min(size, left)
        span = io.BufferedReader(Span(file.fileno(), offset, size))
        try:
            with tarfile.open(fileobj=span, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        whole = member.offset_data + member.size <= size
                        yield Member(member.name, offset + member.offset_data, member.size, whole)
                # tarfile takes a cut or damaged header for the end of the archive.
                span.seek(tar.offset)
                if span.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("damaged header")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise tarfile.ReadError(str(error)) from None
