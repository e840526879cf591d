"""The data that pictures are compared with: what to ask for, and how a network sees it."""

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

# Where the reference in a split of `shapes` starts. Training draws from 2**31 pictures, so next to
# none of these is among those that it has seen.
FIRST_SHAPE = {"train": 2**30, "validation": 0}
SUBSET = 200_000  # pictures of evaluation.reference=train_200k (App. C)
PART = 256  # pictures that a host reads and looks at before all hosts share what they found


@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Place in `numbers` -> the picture's largest centred square at a side: uint8 (S, S, 3)."""

    source: Any
    numbers: np.ndarray
    side: int

    def __call__(self, place: int) -> dict[str, Any]:
        record = self.source[int(self.numbers[place])]
        square = augment.center(record["image"], self.side)
        return {"image": square, "broken": int(record.get("broken", 0))}


def _look(network: FeatureNetwork, records: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Features (PART, D) of PART records of `Square` or fewer, and which rows are of whole ones."""
    features, whole = np.zeros((PART, network.width), np.float32), np.zeros(PART, bool)
    whole[: len(records)] = [not record["broken"] for record in records]
    if whole.any():
        pictures = np.stack([record["image"] for record in records if not record["broken"]])
        with config_errors("evaluation.inception"):
            features[whole] = network(pictures)
    return features, whole


class Reference:
    """The data that evaluation.reference names: its pictures, and what they would be asked for."""

    def __init__(self, config: Config):
        settings = config.evaluation
        self.config, self.split = config, settings.reference
        self._made = config.data.name == "shapes" and not settings.path  # as they are asked for
        if config.data.name == "latents" and not settings.path:
            raise ConfigError(
                "evaluation.path",
                "empty, and data.name=latents has no images; name a data set",
            )
        self.field = "evaluation.path" if settings.path else "data.path"
        with config_errors(self.field):
            self.source = create_source(*self._place())
        n = len(self.source)
        if self._made:
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

    def _place(self) -> tuple[Config, str]:
        """Arguments of `create_source`."""
        config, settings = self.config, self.config.evaluation
        split = "validation" if self.split in ("validation", "coco") else "train"
        if settings.path:
            config = with_fields(config, {"data.name": "tfds", "data.path": settings.path})
        return config, split

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What its pictures depend on, wherever they are."""
        data = self.config.data
        fields = {"split": self.split, "resolution": data.resolution, "count": len(self.numbers)}
        if self._made:
            made = {"sizes": list(data.sizes), "classes": data.classes, "entangled": data.entangled}
            return fields | made
        # Shards are padded to blocks: small sets may agree in all sizes, but not in pictures too.
        some = self.numbers[np.linspace(0, len(self.numbers) - 1, 5).astype(int)]
        with config_errors(self.field):
            pictures = [self.source[int(i)]["image"].tobytes() for i in some]
        seen = hashlib.sha256(b"".join(pictures)).hexdigest()
        return fields | {"files": fingerprint(self.source), "pictures": seen}

    def digest(self, *others: str) -> str:
        """A sha256 of `identity`, and of others."""
        return hashlib.sha256(json.dumps([self.identity, *others]).encode()).hexdigest()

    def features(self, network: FeatureNetwork) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places in `numbers`, features) of all pictures, part by part in order, on every host.

        Their largest centred squares at the resolution are looked at; broken ones are left out.
        Host p of P reads every P-th part, in threads, for a network on its own devices: the order,
        and so the sums over it, are the same for any P. ConfigError for data that cannot be read.
        """
        places, process = np.arange(len(self.numbers)), jax.process_index()
        parts = [places[low : low + PART] for low in range(0, len(places), PART)]
        rounds = range(0, len(parts), jax.process_count())
        own = [part for start in rounds for part in parts[start + process :][:1]]
        squares = CenterCrop(self.source, self.numbers, self.config.data.resolution)
        dataset = grain.MapDataset.source(np.concatenate([places[:0], *own])).map(squares)
        records = read_ahead(dataset, self.config.data.workers)
        quiet = len(rounds) < 2 or process != 0
        for start in tqdm(rounds, desc="reference", leave=False, disable=quiet):
            with config_errors(self.field):
                mine = [] if start + process >= len(parts) else parts[start + process]
                found = _look(network, list(itertools.islice(records, len(mine))))
            of_all = multihost_utils.process_allgather(found)
            for part, features, whole in zip(parts[start:], *of_all, strict=False):
                whole = whole[: len(part)]
                yield part[whole], features[: len(part)][whole]

    def asked(self, n: int, objective: DiffusionObjective) -> list[Any]:
        """Captions or labels of n of them in a random order, those of `shapes` as they come.

        ConfigError where their classes are not the model's.
        """
        what = "label" if objective.text_encoder is None else "caption"
        if what == "label" and tuple(self.source.classes) != objective.vocabulary.classes:
            raise ConfigError("evaluation.path", "its classes are not those of the model")
        order = np.arange(len(self.numbers))
        if not self._made:
            order = np.random.default_rng(1).permutation(order)

        def read(record):
            return {what: record[what]}

        numbers = self.numbers[order[np.arange(n) % len(order)]]
        return [read_record(self.source, int(i), read)[what] for i in numbers]


def reference_statistics(
    network: FeatureNetwork, reference: Reference, folder: epath.Path, *, keep: int = 0
) -> tuple[fid.Statistics, np.ndarray | None]:
    """The moments of the reference in a network's features, and features (M <= keep, D) if asked.

    What is computed is kept in `folder` for the next time.
    """
    name = reference.digest(*network.identity)[:12]
    moments, rows = folder / f"{name}.npz", folder / f"{name}-{keep}.npz"
    found = load_cached(moments, lambda _: fid.load(str(moments)))
    features = load_cached(rows, read_arrays) if keep else {"features": None}
    if found and features:
        return found, features["features"]
    found, features = describe(network, reference, keep)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        found.save(str(moments))
        if keep:
            write_arrays(rows, {"features": features})
    barrier("reference")
    return found, features if keep else None


def describe(
    network: FeatureNetwork, reference: Reference, samples: int = 0
) -> tuple[fid.Statistics, np.ndarray]:
    """The moments of all of a reference's pictures, and the features of so many at random."""
    n, moments, rows = len(reference.numbers), Moments(), []
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(2).permutation(n)[:samples]] = True
    for places, features in reference.features(network):
        if len(places):
            moments.add(features)
        rows.append(features[chosen[places]])
    made_of = reference.digest(*network.identity)
    side = (reference.config.data.resolution,) * 2
    return statistics_of(moments, network, side, made_of), np.concatenate(rows)


def statistics_of(
    moments: Moments, network: FeatureNetwork, side: tuple[int, int], reference: str | None = None
) -> fid.Statistics:
    """Moments with what they are of; ConfigError for fewer than two pictures."""
    with config_errors("evaluation.samples"):
        mean, covariance = moments.result()
    about = moments.count, network.name, network.sha256, side, reference, network.resize
    return fid.Statistics(mean, covariance, *about)
