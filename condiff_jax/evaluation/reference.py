"""Reference data of an evaluation: its images, prompts or labels, and their feature statistics."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import grain
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from condiff_jax.config.build import with_fields
from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import Config
from condiff_jax.data import augment
from condiff_jax.data.pipeline import create_source, read_ahead
from condiff_jax.data.records import fingerprint, read_record
from condiff_jax.evaluation.metrics import fid
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.metrics.frechet import Moments
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.runtime.distributed import barrier
from condiff_jax.runtime.files import load_cached, read_arrays, write_arrays

# First index of the reference in a split of `shapes`. Training draws from 2**31 images, so nearly
# none of the reference has been trained on.
FIRST_SHAPE = {"train": 2**30, "validation": 0}
SUBSET = 200_000  # images of evaluation.reference=train_200k (App. C)
PART = 256  # images whose features a host computes before all hosts exchange theirs


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Map a position in `numbers` to the image's largest centered square, resized: (S, S, 3)."""

    source: Any
    numbers: np.ndarray
    side: int

    def __call__(self, position: int) -> dict[str, Any]:
        record = self.source[int(self.numbers[position])]
        square = augment.center(record["image"], self.side)
        return {"image": square, "broken": int(record.get("broken", 0))}


def _part_features(network: FeatureNetwork, records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Compute features (PART, D) of up to PART records of `CenterCrop`, and a mask (PART,).

    The mask excludes padding and broken images.
    """
    features = np.zeros((PART, network.width), np.float32)
    valid = np.zeros(PART, bool)
    valid[: len(records)] = [not record["broken"] for record in records]
    if valid.any():
        images = np.stack([record["image"] for record in records if not record["broken"]])
        with config_errors("evaluation.inception"):
            features[valid] = network(images)
    return features, valid


class Reference:
    """Data set of evaluation.reference, with its images and their captions or labels."""

    def __init__(self, config: Config):
        settings = config.evaluation
        self.config = config
        self.split = settings.reference
        self._rendered = config.data.name == "shapes" and not settings.path  # on demand
        if config.data.name == "latents" and not settings.path:
            raise ConfigError(
                "evaluation.path",
                "empty, and data.name=latents has no images; name a data set",
            )
        self.field = "evaluation.path" if settings.path else "data.path"
        with config_errors(self.field):
            self.source = create_source(*self._source_arguments())
        n = len(self.source)
        if self._rendered:
            if self.split not in FIRST_SHAPE:
                raise ConfigError(
                    "evaluation.reference",
                    f"data.name=shapes has no {self.split}; choose from {', '.join(FIRST_SHAPE)}",
                )
            first = FIRST_SHAPE[self.split]
            if settings.samples > n - first:
                raise ConfigError(
                    "evaluation.samples",
                    f"is {settings.samples}, but evaluation.reference={self.split} has "
                    f"{n - first} images",
                )
            self.numbers = first + np.arange(settings.samples)
        elif self.split == "train_200k" and n > SUBSET:
            self.numbers = np.sort(np.random.default_rng(0).choice(n, SUBSET, replace=False))
        else:
            self.numbers = np.arange(n)

    def _source_arguments(self) -> tuple[Config, str]:
        """Return the arguments of `create_source`."""
        config, settings = self.config, self.config.evaluation
        split = "validation" if self.split in ("validation", "coco") else "train"
        if settings.path:
            config = with_fields(config, {"data.name": "tfds", "data.path": settings.path})
        return config, split

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the images depend on, independent of their path."""
        data = self.config.data
        fields = {"split": self.split, "resolution": data.resolution, "count": len(self.numbers)}
        if self._rendered:
            fields |= {"sizes": list(data.sizes), "classes": data.classes}
            return fields | {"entangled": data.entangled}
        # Shards are padded to blocks, so small data sets may agree in file sizes: hash five images.
        positions = np.linspace(0, len(self.numbers) - 1, 5).astype(int)
        with config_errors(self.field):
            images = [self.source[int(i)]["image"].tobytes() for i in self.numbers[positions]]
        images_sha256 = hashlib.sha256(b"".join(images)).hexdigest()
        return fields | {"files": fingerprint(self.source), "pictures": images_sha256}

    def digest(self, *values: str) -> str:
        """Return a sha256 of `identity` and of more values."""
        return hashlib.sha256(json.dumps([self.identity, *values]).encode()).hexdigest()

    def features(self, network: FeatureNetwork) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions in `numbers`, features) of all images in order, on every host.

        Features are of the largest centered squares at the resolution; broken images are left out.
        Host p of P reads every P-th part, in threads, for a network on its own devices. The order,
        and so the sums over it, are the same for any P. ConfigError for data that cannot be read.
        """
        positions, process = np.arange(len(self.numbers)), jax.process_index()
        parts = [positions[low : low + PART] for low in range(0, len(positions), PART)]
        rounds = range(0, len(parts), jax.process_count())
        own = [part for start in rounds for part in parts[start + process :][:1]]
        crop = CenterCrop(self.source, self.numbers, self.config.data.resolution)
        dataset = grain.MapDataset.source(np.concatenate([positions[:0], *own])).map(crop)
        records = read_ahead(dataset, self.config.data.workers)
        quiet = len(rounds) < 2 or process != 0
        for start in tqdm(rounds, desc="reference", leave=False, disable=quiet):
            with config_errors(self.field):
                # In the last round the last hosts have no part.
                count = len(parts[start + process]) if start + process < len(parts) else 0
                local = _part_features(network, list(itertools.islice(records, count)))
            gathered = multihost_utils.process_allgather(local)
            for part, features, valid in zip(parts[start:], *gathered, strict=False):
                valid = valid[: len(part)]
                yield part[valid], features[: len(part)][valid]

    def captions_or_labels(self, n: int, objective: DiffusionObjective) -> list[Any]:
        """Return captions or labels of n images, in a random order except for data.name=shapes.

        They repeat where n is larger than the data set. ConfigError for classes other than the
        model's.
        """
        field = "label" if objective.text_encoder is None else "caption"
        if field == "label" and tuple(self.source.classes) != objective.vocabulary.classes:
            raise ConfigError("evaluation.path", "its classes are not those of the model")
        order = np.arange(len(self.numbers))
        if not self._rendered:
            order = np.random.default_rng(1).permutation(order)

        def read(record):
            return {field: record[field]}

        numbers = self.numbers[order[np.arange(n) % len(order)]]
        return [read_record(self.source, int(i), read)[field] for i in numbers]


def reference_statistics(
    network: FeatureNetwork, reference: Reference, folder: epath.Path, *, keep: int = 0
) -> tuple[fid.Statistics, np.ndarray | None]:
    """Return the moments of a reference's features and, with keep, features (M <= keep, D).

    Both are cached in `folder`.
    """
    name = reference.digest(*network.identity)[:12]
    statistics_file, features_file = folder / f"{name}.npz", folder / f"{name}-{keep}.npz"
    statistics = load_cached(statistics_file, lambda _: fid.load(str(statistics_file)))
    cached = load_cached(features_file, read_arrays) if keep else {"features": None}
    if statistics and cached:
        return statistics, cached["features"]
    statistics, features = describe(network, reference, keep)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        statistics.save(str(statistics_file))
        if keep:
            write_arrays(features_file, {"features": features})
    barrier("reference")
    return statistics, features if keep else None


def describe(
    network: FeatureNetwork, reference: Reference, samples: int = 0
) -> tuple[fid.Statistics, np.ndarray]:
    """Compute the feature moments of all images, and the features of `samples` random images."""
    n, moments, rows = len(reference.numbers), Moments(), []
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(2).permutation(n)[:samples]] = True
    for positions, features in reference.features(network):
        if len(positions):
            moments.add(features)
        rows.append(features[chosen[positions]])
    digest = reference.digest(*network.identity)
    resolution = (reference.config.data.resolution,) * 2
    return statistics_of(moments, network, resolution, digest), np.concatenate(rows)


def statistics_of(
    moments: Moments,
    network: FeatureNetwork,
    resolution: tuple[int, int],
    reference: str | None = None,
) -> fid.Statistics:
    """Create the statistics of moments in a network's features; ConfigError for less than 2 images.

    reference: a sha256 of the images and the network.
    """
    with config_errors("evaluation.samples"):
        mean, covariance = moments.result()
    return fid.Statistics(
        mean,
        covariance,
        count=moments.count,
        network=network.name,
        sha256=network.sha256,
        resolution=resolution,
        reference=reference,
        resize=network.resize,
    )
