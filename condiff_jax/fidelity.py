"""How the distribution of pictures compares with a data set's: FID and its relatives, CLIP score.

One generation of evaluation.samples pictures serves them all. It is made in parts; of each part a
file keeps what the metrics need, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from condiff_jax import feature_networks, sample
from condiff_jax.config import Config, ConfigError
from condiff_jax.data import augment
from condiff_jax.data.pipeline import create_source
from condiff_jax.data.records import read_record
from condiff_jax.encoders import blaming
from condiff_jax.metrics import fid, kid, precision_recall, shapes_features
from condiff_jax.metrics.clip_score import ClipScore
from condiff_jax.metrics.features import FeatureNetwork
from condiff_jax.metrics.frechet import Moments, frechet_distance
from condiff_jax.system import System
from condiff_jax.workdir import Workdir, write

# What each metric looks at pictures with.
NETWORK = {
    "fid": "inception",
    "kid": "inception",
    "precision_recall": "inception",
    "frechet_shapes": "shapes",
    "clip_score": "clip",
}
PAIRED = {"kid", "precision_recall"}  # need the reference's features, not only their moments
PART = 512  # pictures whose features are kept in one file
FIRST_INDEX = 10**7  # number of the first sample: its noise is shared with no other metric
# Where the reference in a split of `shapes` starts. Training draws from 2**31 pictures, so next to
# none of these is among those that it has seen.
FIRST_SHAPE = {"train": 2**30, "validation": 0}
SUBSET = 200_000  # pictures of evaluation.reference=train_200k (App. C)
RANDOM = "random"  # evaluation.inception: weights that nobody trained, to try the protocol


def create_networks(
    config: Config, mesh: Mesh | None = None
) -> dict[str, FeatureNetwork | ClipScore]:
    """What evaluation.metrics look at pictures with, by name; ConfigError where it is missing."""
    settings = config.evaluation
    names = {NETWORK[metric] for metric in settings.metrics if metric in NETWORK}
    found = {name: _network(name, getattr(settings, name, "")) for name in sorted(names)}
    return {name: _placed(network, mesh) for name, network in found.items()} if mesh else found


@functools.lru_cache(maxsize=8)  # what is compiled is kept
def _placed(network: FeatureNetwork | ClipScore, mesh: Mesh) -> FeatureNetwork | ClipScore:
    if isinstance(network, ClipScore):
        return dataclasses.replace(network, images=network.images.on(mesh))
    return network.on(mesh)


@functools.lru_cache(maxsize=8)
def _network(name: str, path: str) -> FeatureNetwork | ClipScore:
    if name == "shapes":
        return shapes_features.network()
    with blaming(f"evaluation.{name}"):
        if name == "clip":
            return feature_networks.load_clip(path)
        if path == RANDOM:
            return feature_networks.random_inception()
        return feature_networks.load_inception(path)


def describe_networks(
    networks: dict[str, FeatureNetwork | ClipScore],
) -> dict[str, dict[str, str]] | None:
    """Name and weights' sha256 of each: what numbers are bound to. None without any."""
    pictures = {
        key: network.images if isinstance(network, ClipScore) else network
        for key, network in networks.items()
    }
    found = {k: {"name": network.name, "sha256": network.sha256} for k, network in pictures.items()}
    return found or None


class Reference:
    """The data that evaluation.reference names: its pictures, and what they would be asked for."""

    def __init__(self, config: Config):
        settings = config.evaluation
        self.config, self.split = config, settings.reference
        self._made = config.data.name == "shapes" and not settings.path  # as they are asked for
        if config.data.name == "latents" and not settings.path:
            raise ConfigError("config: a cache of latents has no pictures; set evaluation.path")
        with blaming("evaluation.path" if settings.path else "data.path"):
            self.source = create_source(*self._place())
        n = len(self.source)
        if self._made:
            if self.split not in FIRST_SHAPE:
                raise ConfigError(
                    f"config: evaluation.reference={self.split} is not there for data.name=shapes; "
                    f"choose from {', '.join(FIRST_SHAPE)}"
                )
            first = FIRST_SHAPE[self.split]
            if settings.samples > n - first:
                raise ConfigError(
                    f"config: evaluation.samples={settings.samples}, but evaluation.reference="
                    f"{self.split} has {n - first} pictures"
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
            data = dataclasses.replace(config.data, name="tfds", path=settings.path)
            config = dataclasses.replace(config, data=data)
        return config, split

    def identity(self) -> dict[str, Any]:
        """What its pictures depend on."""
        data = self.config.data
        fields = {"split": self.split, "resolution": data.resolution, "count": len(self.numbers)}
        if self._made:
            made = {"sizes": list(data.sizes), "classes": data.classes, "entangled": data.entangled}
            return fields | made
        return fields | {"path": self.config.evaluation.path or data.path}

    def pictures(self, batch: int = 64) -> Iterator[np.ndarray]:
        """All, as their largest centred squares at the resolution: uint8 (B, R, R, 3)."""
        side = self.config.data.resolution
        parts = range(0, len(self.numbers), batch)
        for low in tqdm(parts, desc="reference pictures", leave=False, disable=len(parts) < 2):
            some = self.numbers[low : low + batch]
            pictures = (self.source[int(i)]["image"] for i in some)
            yield np.stack([augment.center(picture, side)[0] for picture in pictures])

    def asked(self, n: int, system: System) -> list[Any]:
        """Captions or labels of n of them in a random order, those of `shapes` as they come.

        ConfigError where their classes are not the model's.
        """
        what = "label" if system.text_encoder is None else "caption"
        if what == "label" and tuple(self.source.classes) != system.vocabulary.classes:
            raise ConfigError("config: the classes of evaluation.path are not those of the model")
        order = np.arange(len(self.numbers))
        if not self._made:
            order = np.random.default_rng(1).permutation(order)

        def read(record):
            return {what: record[what]}

        numbers = self.numbers[order[np.arange(n) % len(order)]]
        return [read_record(self.source, int(i), read)[what] for i in numbers]


def measure(
    sampler: sample.Sampler, params: dict, folder: Workdir, parts: epath.Path
) -> dict[str, float | bool | None]:
    """Those of evaluation.metrics that are in NETWORK.

    parts: a folder of this measurement alone, for what `generate` keeps.
    """
    config = sampler.system.config
    settings, networks = config.evaluation, create_networks(config, sampler.mesh)
    reference = Reference(config)
    asked = reference.asked(settings.samples, sampler.system)
    made = generate(sampler, params, asked, networks, parts, folder.load_control())
    values: dict[str, float | bool | None] = {}
    if "clip" in made:
        values["clip_score"] = float(made["clip"].mean())
    side = (config.data.resolution,) * 2
    for name in made.keys() - {"clip"}:
        network, wanted = networks[name], {m for m in settings.metrics if NETWORK.get(m) == name}
        moments = Moments()
        moments.add(made[name])
        ours = statistics_of(moments, network, side)
        keep = settings.samples if wanted & PAIRED else 0
        given = settings.statistics if name == "inception" else ""
        if keep or not given:
            theirs, features = reference_statistics(
                network, reference, folder.path / "references", keep=keep
            )
        if given:
            with blaming("evaluation.statistics"):
                theirs = fid.load(given)
        if "frechet_shapes" in wanted:
            both = ours.mean, ours.covariance, theirs.mean, theirs.covariance
            values["frechet_shapes"] = frechet_distance(*both)
        if "fid" in wanted:
            with blaming("evaluation.statistics"):
                values |= fid.fid(ours, theirs)
        with blaming("evaluation.samples"):
            if "kid" in wanted:
                size = min(kid.SIZE, len(made[name]), len(features))
                values |= kid.kid(made[name], features, size=size)
            if "precision_recall" in wanted:
                values |= precision_recall.precision_recall(made[name], features)
    return values


def generate(
    sampler: sample.Sampler,
    params: dict,
    asked: Sequence[Any],
    networks: dict[str, FeatureNetwork | ClipScore],
    folder: epath.Path,
    seen: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """What each network finds in the pictures that are asked for: features (N, D), scores (N,).

    A part that a file in `folder` holds is not made again. seen: see `sample.control_values`. With
    evaluation.save=png the pictures are in folder/pictures, with npz in folder/pictures.npz, as
    arr_0 uint8 (N, R, R, 3), which ADM's evaluator reads.
    """
    save, found = sampler.system.config.evaluation.save, []
    chief = jax.process_index() == 0
    with tqdm(total=len(asked), desc="pictures", unit="img", disable=not chief) as bar:
        for low in range(0, len(asked), PART):
            some = asked[low : low + PART]
            file = folder / f"{low:08d}-{len(some)}{save and '-' + save}.npz"
            values = _load(file, networks)
            if values is None:
                batch = sample.requests(sampler.system, some, first=FIRST_INDEX + low, seen=seen)
                pictures = sampler(params, batch, first=FIRST_INDEX + low)
                values = {
                    name: network(pictures, some) if name == "clip" else network(pictures)
                    for name, network in networks.items()
                }
                if chief:
                    folder.mkdir(parents=True, exist_ok=True)
                    _save_pictures(folder, pictures, low, save)
                    write(file, _npz(values))
            found.append(values)
            bar.update(len(some))
    if save == "npz" and chief:
        side = sampler.system.config.data.resolution
        _join(folder, (len(asked), side, side, 3))
    return {name: np.concatenate([values[name] for values in found]) for name in networks}


def _load(file: epath.Path, networks: dict) -> dict[str, np.ndarray] | None:
    """What `generate` has kept of a part, None if it has not or for other networks."""
    if not file.exists():
        return None
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays} if set(arrays) == set(networks) else None


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    with io.BytesIO() as buffer:
        np.savez(buffer, **arrays)
        return buffer.getvalue()


def _save_pictures(folder: epath.Path, pictures: np.ndarray, low: int, save: str) -> None:
    """Of one part, as evaluation.save says."""
    if not save:
        return
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    if save == "png":
        for i, picture in enumerate(pictures, low):
            sample.save_png(folder / "pictures" / f"{i:06d}.png", Image.fromarray(picture))
    else:
        write(folder / "pictures" / f"{low:08d}.raw", pictures.tobytes())


def _join(folder: epath.Path, shape: tuple[int, ...]) -> None:
    """pictures/*.raw -> pictures.npz with arr_0 of that shape, a part in memory at a time."""
    parts, whole = sorted((folder / "pictures").glob("*.raw")), folder / "pictures.npz"
    if not whole.exists():  # else killed while the parts were removed
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        temporary = folder / "pictures.npz.tmp"
        with (
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for part in parts:
                array.write(part.read_bytes())
        temporary.replace(whole)
    for part in parts:
        part.unlink()
    if (folder / "pictures").exists():
        (folder / "pictures").rmdir()


def saved(folder: epath.Path, save: str) -> bool:
    """Whether the pictures of a finished measurement are there, as evaluation.save says."""
    return not save or (folder / {"png": "pictures", "npz": "pictures.npz"}[save]).exists()


def forget(folder: epath.Path) -> None:
    """Drop the parts of a measurement that is recorded; pictures that were asked for stay."""
    if jax.process_index() == 0 and folder.exists():
        for file in [*folder.glob("*.npz"), *folder.glob("*.json")]:
            if file.name != "pictures.npz":
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def reference_statistics(
    network: FeatureNetwork,
    reference: Reference,
    folder: epath.Path,
    *,
    keep: int = 0,
) -> tuple[fid.Statistics, np.ndarray | None]:
    """The moments of the reference in a network's features, and features (M <= keep, D) if asked.

    What is computed is kept in `folder` for the next time.
    """
    key = json.dumps([reference.identity(), network.sha256], sort_keys=True)
    name = hashlib.sha256(key.encode()).hexdigest()[:12]
    moments = folder / f"{name}.npz"
    rows = folder / f"{name}-{keep}.npy"
    if moments.exists() and (rows.exists() or not keep):
        found = fid.load(str(moments))
        features = np.load(io.BytesIO(rows.read_bytes()), allow_pickle=False) if keep else None
        return found, features
    found, features = describe(network, reference, keep)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        found.save(str(moments))
        if keep:
            with io.BytesIO() as buffer:
                np.save(buffer, features, allow_pickle=False)
                write(rows, buffer.getvalue())
    return found, features


def describe(
    network: FeatureNetwork, reference: Reference, samples: int = 0
) -> tuple[fid.Statistics, np.ndarray]:
    """The moments of all of a reference's pictures, and the features of so many at random."""
    n, moments, kept, low = len(reference.numbers), Moments(), [], 0
    chosen = np.zeros(n, bool)
    chosen[np.random.default_rng(2).permutation(n)[:samples]] = True
    for pictures in reference.pictures():
        features = network(pictures)
        moments.add(features)
        kept.append(features[chosen[low : low + len(features)]])
        low += len(features)
    side = (reference.config.data.resolution,) * 2
    return statistics_of(moments, network, side), np.concatenate(kept)


def statistics_of(
    moments: Moments, network: FeatureNetwork, resolution: tuple[int, int]
) -> fid.Statistics:
    """Moments with what they are of; ConfigError for fewer than two pictures."""
    with blaming("evaluation.samples"):
        return fid.Statistics(
            *moments.result(), moments.count, network.name, network.sha256, resolution
        )


def run_reference(config: Config) -> None:
    """Mode `reference`: statistics of evaluation.reference for FID, in evaluation.statistics."""
    path = config.evaluation.statistics
    if not path:
        raise ConfigError("config: evaluation.statistics is empty; name the .npz file to write")
    if epath.Path(path).exists():
        print(f"Nothing to do: {path} is there.")
        return
    network = _network("inception", config.evaluation.inception)
    statistics, _ = describe(network, Reference(config))
    if statistics.rank_deficient:
        logging.warning("fewer pictures than features: FID against them is too large")
    if jax.process_index() == 0:
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        statistics.save(path)
        print(f"Mean and covariance of {network.name} over {statistics.count} pictures in {path}")
