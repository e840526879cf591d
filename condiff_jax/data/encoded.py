"""The caches of mode encode: each picture's views as moments of an autoencoder.

A shard (array_record) has for each picture a record of JSON (label, caption, control metadata),
one of text features if there are any, and one of moments for each view: training reads the view
it draws and no other. Views 2 k and 2 k + 1 are crop k and its mirror image, if there are flips.

Moments are stored in float16. Its error, 2^-11 of a value, is an eighth of bfloat16's, and what
autoencoders give is far within its range of 65,504; mode encode refuses those that are not.
"""

import bisect
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from condiff_jax.data.augment import SCALARS, augment, mirror
from condiff_jax.data.prepared import open_shard
from condiff_jax.data.records import Records

MANIFEST = "manifest.json"  # written last: with it a cache is whole
BEGUN = ".encode"  # what mode encode keeps until then
MOMENTS, FEATURES = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)


def views(
    record: dict, *, seed: Sequence[int], count: int, resolution: int, crop, flip: bool
) -> tuple[np.ndarray, list[dict]]:
    """A source's record -> its views: uint8 (V, R, R, 3), and the SCALARS of each.

    View k depends on (*seed, k) alone; V is `count`, or with flips twice that.
    """
    found = []
    for k in range(count):
        rng = np.random.default_rng([*seed, k])
        size = record.get("size")
        view = augment(
            record["image"], rng, resolution=resolution, crop=crop, flip=False, original=size
        )
        found += [view, mirror(*view)] if flip else [view]
    images, controls = zip(*found, strict=True)
    return np.stack(images), list(controls)


def pack(record: dict) -> Iterator[bytes]:
    """The records of a picture: {"label", "caption", "controls": SCALARS of each of V views,
    "moments": (V, h, w, C)} and maybe {"features": (n + 1, D), of n tokens and pooled}.
    """
    controls = [[float(one[name]) for name in SCALARS] for one in record["controls"]]
    head = {"label": int(record["label"]), "caption": record["caption"], "controls": controls}
    yield json.dumps(head).encode()
    if "features" in record:
        yield np.asarray(record["features"], FEATURES).tobytes()
    for moments in record["moments"]:
        yield np.asarray(moments, MOMENTS).tobytes()


class Views(Sequence):
    """The views of a picture: (moments float16 (h, w, C), SCALARS), read when asked for."""

    def __init__(self, read: Callable[[int], bytes], controls: list, shape: tuple[int, ...]):
        self._read, self._controls, self._shape = read, controls, shape

    def __len__(self):
        return len(self._controls)

    def __getitem__(self, view):
        control = dict(zip(SCALARS, self._controls[view], strict=True))  # or an IndexError
        return np.frombuffer(self._read(view), MOMENTS).reshape(self._shape), control


class Cache(Records):
    """The training split as mode encode has left it in a folder.

    Items are {"views": Views, "caption", "label", "broken": 0} and, if asked for by `text` and
    there, "features": {"tokens": bfloat16 (T, D), zero outside "mask" (T,), "pooled": (D,)}.
    """

    def __init__(self, path, split: str = "train", *, text: bool = False):
        """Reads the manifest; ValueError or FileNotFoundError for what cannot be read."""
        self.path, self.split = Path(path).expanduser(), split
        self.manifest = read_manifest(self.path)
        if split != "train":
            raise ValueError(f"{path} has no {split} split; mode encode takes train alone")
        self.features = text and bool(self.manifest["features"])
        self.classes = tuple(self.manifest["classes"])
        self._shards = [self.path / shard["name"] for shard in self.manifest["shards"]]
        self._ends = list(itertools.accumulate(s["pictures"] for s in self.manifest["shards"]))
        missing = next((shard for shard in self._shards if not shard.exists()), None)
        if missing:
            raise FileNotFoundError(f"{missing} is missing; copy or encode the data set again")
        super().__init__()

    def _reset(self):
        super()._reset()
        # Bounded, as large sets have more shards than a process may hold open files.
        self._open = functools.lru_cache(maxsize=256)(open_shard)

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, i) -> dict:
        return self.first(i, lambda record: record)

    def _place(self, i: int):
        """(shard, position of the picture's first record, number of records before the views)."""
        before = 1 + bool(self.manifest["features"])
        shard = bisect.bisect_right(self._ends, i)
        first = i - (self._ends[shard - 1] if shard else 0)
        opened = self._open(str(self._shards[shard]))
        return opened, first * (before + self.manifest["views"]), before

    def _head(self, i: int) -> dict:
        shard, first, _ = self._place(i)
        return json.loads(shard.read([first])[0])

    def _record(self, i: int) -> dict:
        shard, first, before = self._place(i)
        head, *features = shard.read([first, first + 1] if self.features else [first])
        head = json.loads(head)
        read = lambda view: shard.read([first + before + view])[0]  # noqa: E731
        record = {"caption": head["caption"], "label": np.int32(head["label"])}
        record["views"] = Views(read, head["controls"], tuple(self.manifest["moments"]))
        if features:
            record["features"] = self._padded(features[0])
        return record

    def _padded(self, data: bytes) -> dict[str, np.ndarray]:
        length, width = self.manifest["features"]
        *tokens, pooled = np.frombuffer(data, FEATURES).reshape(-1, width)
        out = np.zeros((length, width), FEATURES)
        out[: len(tokens)] = tokens
        return {"tokens": out, "mask": np.arange(length) < len(tokens), "pooled": pooled}

    def _where(self, i: int) -> str:
        return f"{i} of {self.path}"

    def _caption(self, i: int) -> str:
        return self._head(i)["caption"]

    def vocabulary(self, max_words: int = 8192) -> tuple[str, ...]:
        """The words of the source; where they were not needed, those of the captions here."""
        return tuple(self.manifest["words"][:max_words]) or super().vocabulary(max_words)


def read_manifest(path: Path) -> dict:
    """What manifest.json says; ValueError or FileNotFoundError where there is no whole cache."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; mode encode makes it")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if "moments" in manifest:
            return manifest
    except FileNotFoundError:
        if (path / BEGUN).exists():
            raise ValueError(f"{path} is not finished; run mode encode again") from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}); encode anew") from error
    raise ValueError(f"{path} holds no cache of mode encode")
