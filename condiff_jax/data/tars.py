"""Positions of the members of uncompressed tars, including nested and truncated ones."""

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: `size` bytes from `offset` of the outermost file."""

    name: str
    offset: int
    size: int
    whole: bool  # False if the tar is cut off within the member


class Span(io.RawIOBase):
    """A read-only file object over `size` bytes of an open file from `offset`."""

    def __init__(self, descriptor: int, offset: int, size: int):
        self._fd, self._offset, self._size = descriptor, offset, size
        self._position = 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + position
        return self._position

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._fd, size, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def members(path: Path, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """Iterate over the regular files of the tar in `size` bytes from `offset` of a file.

    Raises tarfile.ReadError after the last readable member of a truncated, damaged or compressed
    tar.
    """
    with open(path, "rb") as file:
        available = os.fstat(file.fileno()).st_size - offset
        size = available if size is None else min(size, available)
        span = io.BufferedReader(Span(file.fileno(), offset, size))
        try:
            with tarfile.open(fileobj=span, mode="r:") as tar:
                for member in tar:
                    if member.isreg():
                        whole = member.offset_data + member.size <= size
                        yield Member(member.name, offset + member.offset_data, member.size, whole)
                # tarfile treats a cut or damaged header as the end of the archive.
                span.seek(tar.offset)
                if span.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("damaged header")
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise tarfile.ReadError(str(error)) from None
