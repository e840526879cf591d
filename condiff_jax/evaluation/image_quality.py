"""How the distribution of pictures compares with a data set's: FID and its relatives, CLIP score.

One generation of evaluation.samples pictures serves them all. It is made in parts; of each part a
file keeps what the metrics need, so that a killed evaluation goes on where it was.
"""

from __future__ import annotations

import dataclasses
import zipfile
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import NETWORK_FIELDS, Config
from condiff_jax.evaluation import feature_networks
from condiff_jax.evaluation.metrics import fid, kid, precision_recall, shapes_features
from condiff_jax.evaluation.metrics.clip_score import ClipScore
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.metrics.frechet import Moments, frechet_distance
from condiff_jax.evaluation.reference import (
    Reference,
    describe,
    reference_statistics,
    statistics_of,
)
from condiff_jax.runtime import sharding
from condiff_jax.runtime.files import load_cached, read_arrays, write, write_arrays
from condiff_jax.sampling import sample
from condiff_jax.sampling.requests import requests
from condiff_jax.sampling.sampler import Sampler

if TYPE_CHECKING:
    from condiff_jax.evaluation.evaluate import Evaluation

# The network that a metric sees images with.
NETWORK = {"frechet_shapes": "shapes"} | {
    metric: field.removeprefix("evaluation.") for metric, field in NETWORK_FIELDS.items()
}
PAIRED = {"kid", "precision_recall"}  # need the reference's features, not only their moments
PART = 512  # pictures whose features are kept in one file
FIRST_INDEX = 10**7  # number of the first sample: its noise is shared with no other metric
RANDOM = "random"  # evaluation.inception: weights that nobody trained, to try the protocol


def create_networks(config: Config) -> dict[str, FeatureNetwork | ClipScore]:
    """The networks of evaluation.metrics by name; ConfigError where one cannot be read."""
    names = {NETWORK[metric] for metric in config.evaluation.metrics if metric in NETWORK}
    return {name: load_network(config, name) for name in sorted(names)}


def load_network(config: Config, name: str) -> FeatureNetwork | ClipScore:
    """One of them: shapes, inception or clip."""
    if name == "shapes":
        return shapes_features.network()
    settings = config.evaluation
    with config_errors(f"evaluation.{name}"):
        if name == "clip":
            return feature_networks.load_clip(settings.clip)
        if settings.inception == RANDOM:
            network = feature_networks.random_inception()
        else:
            network = feature_networks.load_inception(settings.inception)
    return feature_networks.resized(network, settings.resize)


def place(network: FeatureNetwork | ClipScore, mesh: Mesh) -> FeatureNetwork | ClipScore:
    """The same network on the devices of a mesh."""
    if isinstance(network, ClipScore):
        return dataclasses.replace(network, images=network.images.on(mesh))
    return network.on(mesh)


def min_samples(metrics: Collection[str]) -> int:
    """Pictures of each side that metrics need to be defined."""
    return precision_recall.NEIGHBOURS + 1 if "precision_recall" in metrics else 2


def describe_networks(
    networks: dict[str, FeatureNetwork | ClipScore],
) -> dict[str, dict[str, str]] | None:
    """Name, weights' sha256 and, if it is not its own, resizing of each: what numbers are bound to.

    None without any.
    """
    pictures = {
        key: network.images if isinstance(network, ClipScore) else network
        for key, network in networks.items()
    }
    found = {k: {"name": network.name, "sha256": network.sha256} for k, network in pictures.items()}
    for key, network in pictures.items():
        found[key] |= {"resize": network.resize} if network.resize else {}
    return found or None


def measure(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict[str, float | bool | None], dict]:
    """Those of evaluation.metrics that are in NETWORK; they have no grids.

    parts: a folder of this measurement alone, for what `generate` stores.
    """
    config, folder, reference = evaluation.config, evaluation.folder, evaluation.reference
    settings = config.evaluation
    asked = reference.asked(settings.samples, sampler.objective)
    seen = folder.load_control()
    features = generate(sampler, params, asked, evaluation.networks, parts, seen)
    values: dict[str, float | bool | None] = {}
    if "clip" in features:
        values["clip_score"] = float(features["clip"].mean())
    side = (config.data.resolution,) * 2
    for name in features.keys() - {"clip"}:
        network, ours = evaluation.networks[name], features[name]
        metrics = {metric for metric in settings.metrics if NETWORK.get(metric) == name}
        moments = Moments()
        moments.add(ours)
        statistics = statistics_of(moments, network, side)
        keep = settings.samples if metrics & PAIRED else 0
        file = settings.statistics if name == "inception" else ""
        if keep or not file:
            expected, theirs = reference_statistics(
                evaluation.local_networks[name], reference, folder.path / "references", keep=keep
            )
        if file:
            with config_errors("evaluation.statistics"):
                expected = fid.load(file)
        if "frechet_shapes" in metrics:
            both = statistics.mean, statistics.covariance, expected.mean, expected.covariance
            values["frechet_shapes"] = frechet_distance(*both)
        if "fid" in metrics:
            with config_errors("evaluation.statistics"):
                values |= fid.fid(statistics, expected)
        with config_errors("evaluation.samples"):
            if "kid" in metrics:
                size = min(kid.SIZE, len(ours), len(theirs))
                values |= kid.kid(ours, theirs, size=size)
            if "precision_recall" in metrics:
                values |= precision_recall.precision_recall(ours, theirs)
    return values, {}


def generate(
    sampler: Sampler,
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
    save, found = sampler.objective.config.evaluation.save, []
    chief = jax.process_index() == 0
    with tqdm(total=len(asked), desc="pictures", unit="img", disable=not chief) as bar:
        for low in range(0, len(asked), PART):
            some = asked[low : low + PART]
            file = folder / f"{low:08d}-{len(some)}{save and '-' + save}.npz"
            values = load_cached(file, read_arrays)
            if values is None or set(values) != set(networks):
                batch = requests(sampler.objective, some, first=FIRST_INDEX + low, seen=seen)
                pictures = sampler(params, batch, first=FIRST_INDEX + low)
                values = {name: _look(networks, name, pictures, some) for name in networks}
                if chief:
                    folder.mkdir(parents=True, exist_ok=True)
                    _save_pictures(folder, pictures, low, save)
                    write_arrays(file, values)
            found.append(values)
            bar.update(len(some))
    if save == "npz" and chief:
        side = sampler.objective.config.data.resolution
        _join(folder, (len(asked), side, side, 3))
    return {name: np.concatenate([values[name] for values in found]) for name in networks}


def _look(networks: dict, name: str, pictures: np.ndarray, asked: Sequence[Any]) -> np.ndarray:
    with config_errors(f"evaluation.{name}"):
        return networks[name](pictures, asked) if name == "clip" else networks[name](pictures)


def _save_pictures(folder: epath.Path, pictures: np.ndarray, low: int, save: str) -> None:
    """Of one part, as evaluation.save says."""
    if save == "png":
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures, low):
            sample.save_png(folder / "pictures" / f"{i:06d}.png", Image.fromarray(picture))
    elif save:
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        write(folder / "raw" / f"{low:08d}.raw", pictures.tobytes())


def _join(folder: epath.Path, shape: tuple[int, ...]) -> None:
    """raw/*.raw -> pictures.npz with arr_0 of that shape, a part in memory at a time."""
    whole = folder / "pictures.npz"
    if not whole.exists():  # else killed while the parts were removed
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        temporary = folder / "pictures.npz.tmp"
        with (
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for part in sorted((folder / "raw").glob("*.raw")):
                array.write(part.read_bytes())
        temporary.replace(whole)
    if (folder / "raw").exists():
        (folder / "raw").rmtree()


def saved(folder: epath.Path, config: Config) -> bool:
    """Whether all pictures of a finished measurement are there that evaluation.save asks for."""
    settings = config.evaluation
    if not settings.save or not NETWORK.keys() & set(settings.metrics):
        return True
    if settings.save == "npz":
        return (folder / "pictures.npz").exists()
    return len(list((folder / "pictures").glob("*.png"))) == settings.samples


def delete_parts(folder: epath.Path) -> None:
    """Drop the parts of a measurement that is recorded; pictures that were asked for stay."""
    if jax.process_index() == 0 and folder.exists():
        for file in [*folder.glob("*.npz"), *folder.glob("*.json"), *folder.glob("*.tmp")]:
            if file.name != "pictures.npz":
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def run_reference(config: Config) -> None:
    """Mode `reference`: statistics of evaluation.reference for FID, in evaluation.statistics."""
    path = config.evaluation.statistics
    if not path:
        raise ConfigError("evaluation.statistics", "empty; name the .npz file to write")
    network = place(load_network(config, "inception"), sharding.local_mesh())
    reference = Reference(config)
    with config_errors("evaluation.statistics"):
        if epath.Path(path).exists():
            if fid.load(path).reference != reference.digest(*network.identity):
                raise ValueError(
                    f"{path} is there, but not of these pictures and this network; name another "
                    "file, or remove it"
                )
            print(f"Nothing to do: {path} is there.")
            return
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    statistics, _ = describe(network, reference)
    if statistics.rank_deficient:
        logging.warning("fewer pictures than features: FID against them is too large")
    if jax.process_index() == 0:
        with config_errors("evaluation.statistics"):
            statistics.save(path)
        print(f"Mean and covariance of {network.name} over {statistics.count} pictures in {path}")
