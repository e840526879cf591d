"""The caches of mode encode: each picture's views as moments of an autoencoder.

A shard (array_record) has for each picture a record of JSON (label, caption), one of text features
if there are any, and one for each view: its label and control scalars and its moments. Training
reads the view it draws, and no other. Views 2 k and 2 k + 1 are crop k and its mirror image, if
there are flips.

Moments are stored in float16. Its error, 2^-11 of a value, is an eighth of bfloat16's, and what
autoencoders give is far within its range of 65,504; mode encode refuses those that are not.
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

MANIFEST = "manifest.json"  # written last: with it a cache is whole
BEGUN = ".encode"  # what mode encode keeps until then
FORMAT = 2  # of the records; raise it when they or their meaning change
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
    """The records of a picture: {"label", "caption", "controls": scalars of each of V views,
    "moments": (V, h, w, C)} and maybe {"features": (n + 1, D), of n tokens and pooled}.
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
    """The training split as mode encode has left it in a folder: `views` of each picture."""

    def __init__(self, path, split: str = "train", *, text: bool = False):
        """Reads the manifest; ValueError or FileNotFoundError for what cannot be read.

        text: whether text features, if there are any, are asked for.
        """
        self.path, self.split = Path(path).expanduser(), split
        self.manifest = read_manifest(self.path)
        if split != "train":
            raise ValueError(f"{path} has no {split} split; mode encode takes train alone")
        self.features = text and bool(self.manifest["features"])
        self.classes, self.views = tuple(self.manifest["classes"]), self.manifest["views"]
        self._shape = tuple(self.manifest["moments"])
        self._names = scalar_names(bool(self.manifest["settings"].get("data.color")))
        self._head = head_dtype(len(self._names))
        self._size = (
            self._head.itemsize + math.prod(self._shape) * MOMENTS.itemsize
        )  # of a view's record
        self._before = 1 + bool(self.manifest["features"])  # records before those of the views
        shards = self.manifest["shards"]
        paths = (self.path / shard["name"] for shard in shards)
        self._shards = Shards(paths, (shard["pictures"] for shard in shards))
        super().__init__()

    def __len__(self):
        return len(self._shards)

    def __getitem__(self, i) -> dict:
        """{"caption", "label"} of a picture."""
        return json.loads(self._read(range(len(self))[i], 0))

    def _read(self, i: int, number: int) -> bytes:
        shard, position = self._shards.find(i)
        return shard.read([position * (self._before + self.views) + number])[0]

    def view(self, i: int, k: int, caption: bool = False) -> dict:
        """View k of picture i, or the first good one after it, for `batch` to parse.

        caption: whether "caption" is to be there, too; ValueError where no view is good.
        """

        def read(number: int) -> dict:
            i, k = divmod(number, self.views)
            view = {"view": self._read(i, self._before + k)}
            if len(view["view"]) != self._size:
                raise ValueError(f"it has {len(view['view'])} bytes")
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
        """The words of the source; where they were not needed, those of the captions here."""
        return tuple(self.manifest["words"][:max_words]) or super().vocabulary(max_words)


def read_manifest(path: Path) -> dict:
    """What manifest.json says; ValueError or FileNotFoundError where there is no whole cache."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; mode encode makes it")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if "moments" in manifest:
            if manifest["settings"].get("format") != FORMAT:
                raise ValueError("it is of another version")
            return manifest
    except FileNotFoundError:
        if (path / BEGUN).exists():
            raise ValueError(f"{path} is not finished; run mode encode again") from None
    except ValueError as error:
        raise ValueError(f"{path / MANIFEST} cannot be read ({error}); encode anew") from error
    raise ValueError(f"{path} holds no cache of mode encode")
