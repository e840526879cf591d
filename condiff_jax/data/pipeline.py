"""Training input pipeline: grain data sets, sharded by host, that can start at any batch."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from condiff_jax.conditioning.control import scalar_names
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config
from condiff_jax.data.augment import augment
from condiff_jax.data.cifar10 import Cifar10
from condiff_jax.data.latent_cache import Cache
from condiff_jax.data.records import read_record
from condiff_jax.data.shapes import Shapes
from condiff_jax.data.tfds_source import TFDS
from condiff_jax.data.webdataset import Webdataset
from condiff_jax.data.workers import leave_signals_to_parent

BLOCK = 4096  # examples whose views are sampled at once; changing it changes the stream

# Each source is a random-access sequence of {"image": uint8 (H, W, 3), "caption": str,
# "label": int} and, if the original was larger, "size": its (height, width). It has
# `vocabulary()` (words of the captions) and `classes` (names of the labels). A latent cache has
# `view` instead of images.
SOURCES = {
    "shapes": lambda config, split: Shapes(
        split, config.data.sizes, config.data.classes, config.data.entangled
    ),
    "webdataset": lambda config, split: Webdataset(config.data.path, split),
    "tfds": lambda config, split: TFDS(config.data.path, split),
    "cifar10": lambda config, split: Cifar10(config.data.path, split),
    "latents": lambda config, split: Cache(
        config.data.path,
        split,
        text=config.data.semantics == "text" and config.text_encoder.name == "clip",
    ),
}


def unseen_source(config: Config):
    """Open the validation split, or the training split if the data has no other."""
    try:
        return create_source(config, "validation")
    except (OSError, ValueError):
        return create_source(config, "train")


def create_source(config: Config, split: str = "train"):
    """Open the data set `config.data.name`; ValueError or FileNotFoundError for a bad path."""
    if config.data.name != "shapes" and not config.data.path:
        raise ValueError(f"empty, but data.name={config.data.name} needs a path")
    if "://" in config.data.path:
        raise ValueError(f"{config.data.path} is not a folder; mount it on every host (gcsfuse)")
    return SOURCES[config.data.name](config, split)


@dataclasses.dataclass(frozen=True)
class Preprocess(grain.transforms.RandomMap):
    """Map the index of a source's record to a training example of fixed shapes.

    image uint8 (R, R, 3), label int32, control {scalar: float32}, broken int32 (number of bad
    records skipped), and with `encode_text` ids int32 (T,) and mask bool (T,).
    """

    source: Any
    resolution: int
    crop: tuple[float, float]
    flip: bool
    encode_text: Any = None  # caption -> (ids, mask)
    color: float = 0.0

    def random_map(self, i: int, rng: np.random.Generator) -> dict:
        state = rng.bit_generator.state

        def draw(record: dict) -> dict:
            # A bad record before this one may have used random numbers.
            rng.bit_generator.state = state
            image, control = augment(
                record["image"], rng,
                resolution=self.resolution, crop=self.crop, flip=self.flip, color=self.color,
                original=record.get("size"),
            )  # fmt: skip
            return record | {"image": image, "control": control}

        record = read_record(self.source, i, draw)
        example = {
            "image": record["image"],
            "label": np.int32(record["label"]),
            "control": record["control"],
            "broken": np.int32(record.get("broken", 0)),
        }
        if self.encode_text is not None:
            example["ids"], example["mask"] = self.encode_text(record["caption"])
        return example


@dataclasses.dataclass(frozen=True)
class SampleView(grain.transforms.MapWithIndex):
    """Map the index of an image in a latent cache to one of its views, for `Cache.batch`."""

    source: Cache
    seed: int
    encode_text: Any = None  # caption -> (ids, mask); unused if the cache has features

    def map_with_index(self, index: int, i: int) -> dict:
        encode_text = None if self.source.features else self.encode_text
        block, position = divmod(index, BLOCK)
        k = int(_sampled_views(self.seed, block, self.source.views)[position])
        view = self.source.view(i, k, caption=encode_text is not None)
        if encode_text is not None:
            view["ids"], view["mask"] = encode_text(view["caption"])
        return view


@functools.lru_cache(64)
def _sampled_views(seed: int, block: int, views: int) -> np.ndarray:
    """Sample the views of BLOCK examples at once; a generator for each is as slow as reading."""
    return np.random.default_rng([seed, block]).integers(views, size=BLOCK)


def examples(config: Config, source, encode_text=None) -> grain.MapDataset:
    """Return the endless stream of examples; example i depends on (config.seed, i) alone.

    Examples of a latent cache are unparsed; its `batch` parses many at a time.
    """
    data = config.data
    indices = grain.MapDataset.range(len(source)).seed(config.seed).shuffle().repeat()
    if isinstance(source, Cache):
        return indices.map_with_index(SampleView(source, config.seed, encode_text))
    process = Preprocess(source, data.resolution, data.crop, data.flip, encode_text, data.color)
    return indices.random_map(process)


def first_controls(config: Config, source, n: int = 1024) -> np.ndarray:
    """Control scalars of the first n training examples, (n, S) f32, in the order of `SCALARS`."""
    stream = examples(config, source)
    names = scalar_names(bool(config.data.color))
    if isinstance(source, Cache):
        control = source.batch([stream[i] for i in range(n)])["control"]
        return np.stack([control[name] for name in names], 1)
    controls = (stream[i]["control"] for i in range(n))
    return np.array([[control[name] for name in names] for control in controls], np.float32)


def read_ahead(dataset: grain.MapDataset, workers: int) -> Iterator[Any]:
    """Iterate over the items in order, prefetched by a thread per core and `workers` processes."""
    threads = os.cpu_count() or 1
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * threads)
    dataset = dataset.to_iter_dataset(options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        dataset = dataset.mp_prefetch(options, leave_signals_to_parent)
    yield from dataset


def batches(
    config: Config,
    source,
    encode_text=None,
    *,
    first: int = 0,
    process: int = 0,
    processes: int = 1,
) -> grain.DatasetIterator:
    """Return host `process`'s part of the endless batches of `examples`, from batch `first` on.

    The global batch i does not depend on the number of hosts: it has examples i B to
    (i + 1) B - 1. Host p has the p-th of its equal parts, in the order of a mesh's devices.
    """
    data = config.data
    dataset = examples(config, source, encode_text).batch(
        config.batch_size // processes,
        drop_remainder=True,
        batch_fn=source.batch if isinstance(source, Cache) else None,
    )[first * processes + process :: processes]
    # Decoding releases the GIL, so each of several threads makes a batch. The short reads of a
    # cache do not, and more threads would slow them down.
    single = data.workers or isinstance(source, Cache)
    threads = 1 if single else min(os.cpu_count() or 1, 8)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(4, threads))
    dataset = dataset.to_iter_dataset(options)
    if data.workers:
        options = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=4)
        dataset = dataset.mp_prefetch(options, leave_signals_to_parent)
    return iter(dataset)


def open_source(config: Config):
    """Open the training data; ConfigError if it cannot be read."""
    if config.data.path and config.data.name == "shapes":
        raise ConfigError(
            "data.path",
            f"is {config.data.path}, but data.name=shapes reads no files; set data.name to "
            "tfds (written by mode prepare), cifar10, webdataset or latents",
        )
    try:
        return create_source(config)
    except (OSError, ValueError) as error:
        raise ConfigError("data.path", one_line(error)) from error
