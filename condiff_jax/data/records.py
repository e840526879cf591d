"""Base classes of file-backed data sets, which skip bad records, and vocabularies of captions."""

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
    """Random access to the items of a data set that is split over several array_record files."""

    def __init__(self, paths: Iterable[Path], counts: Iterable[int]):
        """counts: items of each file. FileNotFoundError if a file is missing."""
        self._paths = list(map(str, paths))
        self._ends = list(itertools.accumulate(counts))
        missing = next((path for path in self._paths if not Path(path).exists()), None)
        if missing:
            raise FileNotFoundError(f"{missing} is missing; copy it, or make the data set again")
        self._reset()

    def _reset(self):
        # Bounded, as large data sets have more shards than a process may have open files.
        self._open = functools.lru_cache(maxsize=256)(open_shard)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._reset()

    def __len__(self):
        return self._ends[-1] if self._ends else 0

    def find(self, i: int) -> tuple:
        """The (thread-safe) reader of item i's file, and the position of the item in that file."""
        shard = bisect.bisect_right(self._ends, i)
        start = self._ends[shard - 1] if shard else 0
        return self._open(self._paths[shard]), i - start


def open_shard(path: str):
    """Open one array_record file for random access."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(path, options="readahead_buffer_size:0", file_reader_buffer_size=2**15)


class Records:
    """A random-access sequence of records with images, some of which may fail to decode.

    Items are {"image": uint8 (H, W, 3), "caption": str, "label": int32, "broken": int32, the number
    of bad records skipped}, and "size", the original (height, width) in pixels, where the stored
    image is a smaller version. Subclasses set `path`, `split` and `_shards` (paths), and define
    `__len__`, `_record(i)` (its image is `Encoded`; it may raise anything for a bad record),
    `_caption(i)` and `_where(i)` (a name of the record for log messages).
    """

    def __init__(self):
        self._reset()

    def _reset(self):
        """Create the state that is not pickled."""
        self._broken = set()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_open", "_broken")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._reset()

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}, split={self.split!r})"

    def __getitem__(self, i) -> dict:
        """Decode the first good record at or after i (mod n); ValueError if there is none."""
        return self.first(i, lambda record: record | {"image": record["image"].decode()})

    def files(self) -> list[tuple[str, int]]:
        """Name and size in bytes of each record file; they identify the data, see `fingerprint`."""
        paths = map(Path, self._shards)
        return [(path.name, path.stat().st_size) for path in paths]

    def first(self, i, read: Callable[[dict], dict]) -> dict:
        """Apply `read` to the first record at or after i (mod n) for which it succeeds.

        The record's image is not decoded yet. "broken" is added to the result. ValueError if there
        is no such record.
        """
        return self._first(i, len(self), lambda index: read(self._record(index)))

    def _first(self, i, n: int, read: Callable[[int], dict]) -> dict:
        """Implement `first` for n items that `read` takes by index."""
        i = operator.index(i)
        if not -n <= i < n:
            raise IndexError(f"sample {i} of {n} in {self.path}")
        for skipped in range(n):
            record = self._try_read((i + skipped) % n, read)
            if record is not None:
                return record | {"broken": np.int32(skipped)}
        raise ValueError(f"{self.path} has no decodable {self.split} image; check its shards")

    def _try_read(self, i: int, read: Callable[[int], dict]) -> dict | None:
        if i in self._broken:
            return None
        try:
            return read(i)
        except Exception as error:  # Pillow can raise nearly anything on damaged files
            self._broken.add(i)
            logging.warning("skipping record %s: %s", self._where(i), error)
            return None

    def captions(self) -> Iterator[str]:
        """Captions of all records in order, including bad ones; no image is decoded."""
        return map(self._caption, range(len(self)))

    def vocabulary(self, max_words: int = 8192) -> tuple[str, ...]:
        """Lower-case words of the captions, most frequent first, ties in alphabetical order."""
        return tuple(by_frequency(count_words(self.captions()))[:max_words])


def read_record(source, i: int, read: Callable[[dict], dict]) -> dict:
    """Apply `read` to record i of any source; of `Records`, to the first good one from i on.

    The image of `Records` is not decoded yet, so that `read` can decode only what it crops.
    """
    return source.first(i, read) if isinstance(source, Records) else read(source[i])


def count_words(captions: Iterable[str]) -> Counter:
    """Count each lower-case word in all captions."""
    return Counter(word for text in captions for word in re.findall(r"[a-z0-9']+", text.lower()))


def by_frequency(counts: Counter) -> list[str]:
    """Words sorted most frequent first, ties in alphabetical order."""
    return sorted(counts, key=lambda word: (-counts[word], word))


def fingerprint(source) -> str:
    """A sha256 of a source's length and of the names and sizes of its files."""
    files = source.files() if isinstance(source, Records) else []
    return hashlib.sha256(json.dumps([len(source), files]).encode()).hexdigest()
