"""Caches written by mode encode: views of each image as moments of an autoencoder's posterior.

For each image, a shard (array_record) has a record of JSON (label, caption), a record of text
features if there are any, and a record for each view: its control scalars as float32, its label,
and its moments. Training reads only the view that it samples. With flips, views 2 k and 2 k + 1 are
crop k and its mirror image.

Moments are stored in float16: its relative error, 2^-11, is an eighth of bfloat16's. Moments are
far smaller than its maximum of 65,504; mode encode raises an error if they are not.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from condiff_jax.conditioning.control import SCALARS, scalar_names
from condiff_jax.data.augment import augment, mirror
from condiff_jax.data.records import Records, Shards

MANIFEST = "manifest.json"  # written last, so it marks a complete cache
BEGUN = ".encode"  # work folder of mode encode until the cache is complete
FORMAT = 2  # of the records; increase it if they or their meaning change
MOMENTS, FEATURES = np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)


def head_dtype(scalars: int) -> np.dtype:
    """The beginning of a view's record: its label, and so many control scalars."""
    return np.dtype([("label", "<i4"), ("control", "<f4", scalars)])


def views(
    record: dict,
    *,
    seed: Sequence[int],
    count: int,
    resolution: int,
    crop,
    flip: bool,
    color: float,
) -> tuple[np.ndarray, list[dict]]:
    """A source's record -> its views: uint8 (V, R, R, 3), and the control scalars of each.

    View k depends on (*seed, k) alone; V is `count`, or with flips twice that.
    """
    found = []
    for k in range(count):
        rng = np.random.default_rng([*seed, k])
        size = record.get("size")
        view = augment(
            record["image"], rng,
            resolution=resolution, crop=crop, flip=False, color=color, original=size,
        )  # fmt: skip
        found += [view, mirror(*view)] if flip else [view]
    images, controls = zip(*found, strict=True)
    return np.stack(images), list(controls)


def pack(record: dict) -> Iterator[bytes]:
    """Serialize one image to its records.

    record: {"label", "caption", "controls": scalars of each of V views, "moments": (V, h, w, C)},
    and optionally {"features": (n + 1, D), of n tokens and pooled}.
    """
    label = int(record["label"])
    yield json.dumps({"label": label, "caption": record["caption"]}).encode()
    if "features" in record:
        yield np.asarray(record["features"], FEATURES).tobytes()
    for control, moments in zip(record["controls"], record["moments"], strict=True):
        names = [name for name in SCALARS if name in control]
        head = np.array((label, [control[name] for name in names]), head_dtype(len(names)))
        yield head.tobytes() + np.asarray(moments, MOMENTS).tobytes()


class Cache(Records):
    """The training split in a folder written by mode encode: `views` of each image."""

    def __init__(self, path, split: str = "train", *, text: bool = False):
        """Read the manifest; ValueError or FileNotFoundError if it cannot be read.

        text: whether to read text features, if there are any.
        """
        self.path = Path(path).expanduser()
        self.split = split
        self.manifest = read_manifest(self.path)
        if split != "train":
            raise ValueError(f"{path} has no {split} split; mode encode writes train only")
        self.features = text and bool(self.manifest["features"])
        self.classes = tuple(self.manifest["classes"])
        self.views = self.manifest["views"]
        self._shape = tuple(self.manifest["moments"])
        self._names = scalar_names(bool(self.manifest["settings"].get("data.color")))
        self._head = head_dtype(len(self._names))
        # bytes of a view's record
        self._size = self._head.itemsize + math.prod(self._shape) * MOMENTS.itemsize
        self._before = 1 + bool(self.manifest["features"])  # records that precede the views
        shards = self.manifest["shards"]
        paths = (self.path / shard["name"] for shard in shards)
        self._shards = Shards(paths, (shard["pictures"] for shard in shards))
        super().__init__()

    def __len__(self):
        return len(self._shards)

    def __getitem__(self, i) -> dict:
        """Return {"caption", "label"} of image i."""
        return json.loads(self._read(range(len(self))[i], 0))

    def _read(self, i: int, number: int) -> bytes:
        shard, position = self._shards.find(i)
        return shard.read([position * (self._before + self.views) + number])[0]

    def view(self, i: int, k: int, caption: bool = False) -> dict:
        """Read view k of image i, or the first good view after it, as input of `batch`.

        caption: whether to include "caption". ValueError if no view is good.
        """

        def read(number: int) -> dict:
            i, k = divmod(number, self.views)
            view = {"view": self._read(i, self._before + k)}
            if len(view["view"]) != self._size:
                raise ValueError(f"it has {len(view['view'])} bytes, not {self._size}")
            if self.features:
                view |= self._padded(self._read(i, 1))
            return view | {"caption": self._caption(i)} if caption else view

        return self._first(i * self.views + k, len(self) * self.views, read)

    def batch(self, found: Sequence[dict]) -> dict:
        """B times `view` -> a training batch.

        moments float16 (B, h, w, C), label int32 (B,), control {scalar: float32 (B,)}, broken int32
        (B,), and with features tokens bfloat16 (B, T, D), zero outside mask (B, T), and pooled
        (B, D). What else the views were given is stacked, too.
        """
        records = [memoryview(one["view"]) for one in found]
        split = self._head.itemsize
        heads = np.frombuffer(b"".join(one[:split] for one in records), self._head)
        moments = np.frombuffer(b"".join(one[split:] for one in records), MOMENTS)
        out = {"moments": moments.reshape(-1, *self._shape), "label": heads["label"].copy()}
        out["control"] = dict(zip(self._names, heads["control"].T.copy(), strict=True))
        names = found[0].keys() - {"view", "caption"}
        return out | {name: np.stack([one[name] for one in found]) for name in names}

    def _padded(self, data: bytes) -> dict[str, np.ndarray]:
        length, width = self.manifest["features"]
        *tokens, pooled = np.frombuffer(data, FEATURES).reshape(-1, width)
        out = np.zeros((length, width), FEATURES)
        out[: len(tokens)] = tokens
        return {"tokens": out, "mask": np.arange(length) < len(tokens), "pooled": pooled}

    def _where(self, i: int) -> str:
        return f"{i // self.views}, view {i % self.views}, of {self.path}"

    def _caption(self, i: int) -> str:
        return json.loads(self._read(i, 0))["caption"]

    def vocabulary(self, max_words: int = 8192) -> tuple[str, ...]:
        """Words of the encoded source; if it stored none, those of the captions in this cache."""
        return tuple(self.manifest["words"][:max_words]) or super().vocabulary(max_words)


def read_manifest(path: Path) -> dict:
    """Read manifest.json; ValueError or FileNotFoundError if there is no complete cache."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; mode encode makes it")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if "moments" in manifest:
            if manifest["settings"].get("format") != FORMAT:
                raise ValueError("its records are of another version")
            return manifest
    except FileNotFoundError:
        if (path / BEGUN).exists():
            raise ValueError(f"{path} is not finished; run mode encode again") from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}); encode again") from error
    raise ValueError(f"{path} holds no cache of mode encode; give the folder of one")
