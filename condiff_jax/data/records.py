"""What all data sets in files share: bad records are skipped, captions make a vocabulary."""

import bisect
import functools
import hashlib
import itertools
import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging


class Shards:
    """array_record files, of which each has its share of the items of a data set."""

    def __init__(self, paths: Iterable[Path], counts: Iterable[int]):
        """FileNotFoundError where one of the files is missing."""
        self._paths, self._ends = list(map(str, paths)), list(itertools.accumulate(counts))
        missing = next((path for path in self._paths if not Path(path).exists()), None)
        if missing:
            raise FileNotFoundError(f"{missing} is missing; copy it, or make the data set again")
        self._reset()

    def _reset(self):
        # Bounded, as large sets have more shards than a process may hold open files.
        self._open = functools.lru_cache(maxsize=256)(open_shard)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._reset()

    def __len__(self):
        return self._ends[-1] if self._ends else 0

    def find(self, i: int) -> tuple:
        """The reader of item i's file, which threads may share, and the item's place in it."""
        shard = bisect.bisect_right(self._ends, i)
        return self._open(self._paths[shard]), i - (self._ends[shard - 1] if shard else 0)


def open_shard(path: str):
    """A reader of one array_record file, of records at random."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)


class Records:
    """A random-access sequence of pictures, some of which may not decode.

    Subclasses set `path`, `split` and `_shards` (paths), and define `__len__`, `_record(i)` (whose
    image is `Encoded`; it raises anything for a bad one), `_caption(i)` and `_where(i)`. Items are
    {"image": uint8 (H, W, 3), "caption": str, "label": int32, "broken": int32, the bad records
    skipped to get there}, and where the picture was made smaller, "size": its original (height,
    width) in pixels.
    """

    def __init__(self):
        self._reset()

    def _reset(self):
        """Make what does not travel to other processes."""
        self._broken = set()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_open", "_broken")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._reset()

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}, split={self.split!r})"

    def __getitem__(self, i) -> dict:
        """The first good record at or after i (mod n); ValueError when there is none."""
        return self.first(i, lambda record: record | {"image": record["image"].decode()})

    def files(self) -> list[tuple[str, int]]:
        """Name and size in bytes of each file with records: with another list they are others."""
        paths = map(Path, self._shards)
        return [(path.name, path.stat().st_size) for path in paths]

    def first(self, i, read: Callable[[dict], dict]) -> dict:
        """read(record), and "broken", of the first record at or after i (mod n) that allows it.

        The image that `read` gets is not decoded yet. ValueError when there is no such record.
        """
        return self._first(i, len(self), lambda number: read(self._record(number)))

    def _first(self, i, n: int, read: Callable[[int], dict]) -> dict:
        """`first` of n things that are read by their number."""
        i = operator.index(i)
        if not -n <= i < n:
            raise IndexError(f"sample {i} of {n} in {self.path}")
        for skipped in range(n):
            record = self._good((i + skipped) % n, read)
            if record is not None:
                return record | {"broken": np.int32(skipped)}
        raise ValueError(f"{self.path} has no decodable {self.split} image; check its shards")

    def _good(self, i: int, read: Callable[[int], dict]) -> dict | None:
        if i in self._broken:
            return None
        try:
            return read(i)
        except Exception as error:  # damaged files make Pillow raise nearly anything
            self._broken.add(i)
            logging.warning("skipping record %s: %s", self._where(i), error)
            return None

    def captions(self) -> Iterator[str]:
        """Every sample's caption in order, broken images' included, decoding no image."""
        return map(self._caption, range(len(self)))

    def vocabulary(self, max_words: int = 8192) -> tuple[str, ...]:
        """The captions' lower-case words, most frequent first, ties in alphabetical order."""
        return tuple(by_frequency(count_words(self.captions()))[:max_words])


def read_record(source, i: int, read: Callable[[dict], dict]) -> dict:
    """read(record) of number i of any source; of files as `Records.first`, for the crop alone."""
    return source.first(i, read) if isinstance(source, Records) else read(source[i])


def count_words(captions: Iterable[str]) -> Counter:
    """How often each lower-case word occurs in all captions."""
    return Counter(word for text in captions for word in re.findall(r"[a-z0-9']+", text.lower()))


def by_frequency(counts: Counter) -> list[str]:
    """The words, most frequent first, ties in alphabetical order."""
    return sorted(counts, key=lambda word: (-counts[word], word))


def fingerprint(source) -> str:
    """A sha256 that differs between sources with other files, or of other length."""
    files = source.files() if isinstance(source, Records) else []
    return hashlib.sha256(json.dumps([len(source), files]).encode()).hexdigest()
