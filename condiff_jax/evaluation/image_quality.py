"""Image quality: FID, KID, precision and recall against a reference data set, and CLIP score.

All metrics share evaluation.samples generated images. They are generated in parts, and a file for
each part caches the features that the metrics need, so that a killed evaluation resumes.
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
from condiff_jax.runtime.files import (
    atomic_path,
    load_cached,
    read_arrays,
    write_arrays,
    write_file,
)
from condiff_jax.sampling import sample
from condiff_jax.sampling.requests import create_batch
from condiff_jax.sampling.sampler import Sampler

if TYPE_CHECKING:
    from condiff_jax.evaluation.evaluate import Evaluation

# The feature network of each metric.
NETWORK = {"frechet_shapes": "shapes"} | {
    metric: field.removeprefix("evaluation.") for metric, field in NETWORK_FIELDS.items()
}
PAIRED = {"kid", "precision_recall"}  # need the reference's features, not only their moments
PART = 512  # images whose features are cached in one file
FIRST_INDEX = 10**7  # of the first sample: no other metric uses the same noise
RANDOM = "random"  # evaluation.inception: random weights, to test the protocol


def create_networks(config: Config) -> dict[str, FeatureNetwork | ClipScore]:
    """Load the networks of evaluation.metrics by name; ConfigError where one cannot be read."""
    names = {NETWORK[metric] for metric in config.evaluation.metrics if metric in NETWORK}
    return {name: load_network(config, name) for name in sorted(names)}


def load_network(config: Config, name: str) -> FeatureNetwork | ClipScore:
    """Load one network by name: shapes, inception or clip."""
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


def on_mesh(network: FeatureNetwork | ClipScore, mesh: Mesh) -> FeatureNetwork | ClipScore:
    """Return the network on the devices of a mesh."""
    if isinstance(network, ClipScore):
        return dataclasses.replace(network, images=network.images.on(mesh))
    return network.on(mesh)


def min_samples(metrics: Collection[str]) -> int:
    """Return how many generated and how many reference images metrics need to be defined."""
    return precision_recall.NEIGHBORS + 1 if "precision_recall" in metrics else 2


def describe_networks(
    networks: dict[str, FeatureNetwork | ClipScore],
) -> dict[str, dict[str, str]] | None:
    """Return name and sha256 of each network, and its resizing if not its own; None without any."""
    descriptions = {}
    for key, network in networks.items():
        images = network.images if isinstance(network, ClipScore) else network
        descriptions[key] = {"name": images.name, "sha256": images.sha256}
        if images.resize:
            descriptions[key]["resize"] = images.resize
    return descriptions or None


def measure(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict[str, float | bool | None], dict]:
    """Measure those of evaluation.metrics that are in NETWORK; they have no grids.

    parts: a folder of this measurement, in which `generate` caches parts.
    """
    config, folder, reference = evaluation.config, evaluation.folder, evaluation.reference
    settings = config.evaluation
    prompts = reference.captions_or_labels(settings.samples, sampler.objective)
    seen = folder.load_control()
    outputs = generate(sampler, params, prompts, evaluation.networks, parts, seen)
    values: dict[str, float | bool | None] = {}
    if "clip" in outputs:
        values["clip_score"] = float(outputs["clip"].mean())
    resolution = (config.data.resolution,) * 2
    for name in outputs.keys() - {"clip"}:
        network, features = evaluation.networks[name], outputs[name]
        metrics = {metric for metric in settings.metrics if NETWORK.get(metric) == name}
        moments = Moments()
        moments.add(features)
        statistics = statistics_of(moments, network, resolution)
        keep = settings.samples if metrics & PAIRED else 0
        file = settings.statistics if name == "inception" else ""
        if keep or not file:
            expected, reference_features = reference_statistics(
                evaluation.local_networks[name], reference, folder.path / "references", keep=keep
            )
        if file:
            with config_errors("evaluation.statistics"):
                expected = fid.load(file)
        if "frechet_shapes" in metrics:
            values["frechet_shapes"] = frechet_distance(
                statistics.mean, statistics.covariance, expected.mean, expected.covariance
            )
        if "fid" in metrics:
            with config_errors("evaluation.statistics"):
                values |= fid.fid(statistics, expected)
        with config_errors("evaluation.samples"):
            if "kid" in metrics:
                size = min(kid.SIZE, len(features), len(reference_features))
                values |= kid.kid(features, reference_features, size=size)
            if "precision_recall" in metrics:
                values |= precision_recall.precision_recall(features, reference_features)
    return values, {}


def generate(
    sampler: Sampler,
    params: dict,
    prompts: Sequence[Any],
    networks: dict[str, FeatureNetwork | ClipScore],
    folder: epath.Path,
    seen: np.ndarray | None,
) -> dict[str, np.ndarray]:
    """Sample images for prompts or labels and return each network's features (N, D) or scores (N,).

    Parts are cached in files of `folder`. seen: see `requests.control_values`. The images are saved
    in folder/pictures with evaluation.save=png, and with npz in folder/pictures.npz as arr_0 uint8
    (N, R, R, 3), which ADM's evaluator reads.
    """
    save = sampler.objective.config.evaluation.save
    is_main = jax.process_index() == 0
    parts = []
    with tqdm(total=len(prompts), desc="images", unit="img", disable=not is_main) as bar:
        for low in range(0, len(prompts), PART):
            part = prompts[low : low + PART]
            file = folder / f"{low:08d}-{len(part)}{save and '-' + save}.npz"
            values = load_cached(file, read_arrays)
            if values is None or set(values) != set(networks):
                batch = create_batch(sampler.objective, part, first=FIRST_INDEX + low, seen=seen)
                images = sampler(params, batch, first=FIRST_INDEX + low)
                values = {name: _apply(networks, name, images, part) for name in networks}
                if is_main:
                    folder.mkdir(parents=True, exist_ok=True)
                    _save_images(folder, images, low, save)
                    write_arrays(file, values)
            parts.append(values)
            bar.update(len(part))
    if save == "npz" and is_main:
        side = sampler.objective.config.data.resolution
        _join_raw(folder, (len(prompts), side, side, 3))
    return {name: np.concatenate([values[name] for values in parts]) for name in networks}


def _apply(networks: dict, name: str, images: np.ndarray, prompts: Sequence[Any]) -> np.ndarray:
    with config_errors(f"evaluation.{name}"):
        return networks[name](images, prompts) if name == "clip" else networks[name](images)


def _save_images(folder: epath.Path, images: np.ndarray, low: int, save: str) -> None:
    """Save the images of the part that starts at `low` in the format evaluation.save, if any."""
    if save == "png":
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        for i, image in enumerate(images, low):
            sample.save_png(folder / "pictures" / f"{i:06d}.png", Image.fromarray(image))
    elif save:
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        write_file(folder / "raw" / f"{low:08d}.raw", images.tobytes())


def _join_raw(folder: epath.Path, shape: tuple[int, ...]) -> None:
    """Join raw/*.raw into pictures.npz with arr_0 of a shape, with one part in memory at a time."""
    path = folder / "pictures.npz"
    if not path.exists():  # it exists if killed while the parts were deleted
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with (
            atomic_path(path) as temporary,
            temporary.open("wb") as file,
            zipfile.ZipFile(file, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as array,
        ):
            np.lib.format.write_array_header_1_0(array, header)
            for part in sorted((folder / "raw").glob("*.raw")):
                array.write(part.read_bytes())
    if (folder / "raw").exists():
        (folder / "raw").rmtree()


def saved(folder: epath.Path, config: Config) -> bool:
    """Return whether a finished measurement has saved all images that evaluation.save requires."""
    settings = config.evaluation
    if not settings.save or not NETWORK.keys() & set(settings.metrics):
        return True
    if settings.save == "npz":
        return (folder / "pictures.npz").exists()
    return len(list((folder / "pictures").glob("*.png"))) == settings.samples


def delete_parts(folder: epath.Path) -> None:
    """Delete the cached parts of a recorded measurement; images of evaluation.save stay."""
    if jax.process_index() == 0 and folder.exists():
        for file in [*folder.glob("*.npz"), *folder.glob("*.json"), *folder.glob("*.tmp")]:
            if file.name != "pictures.npz":
                file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def run_reference(config: Config) -> None:
    """Run mode `reference`: write the FID statistics of a data set to evaluation.statistics."""
    path = config.evaluation.statistics
    if not path:
        raise ConfigError("evaluation.statistics", "empty; name the .npz file to write")
    network = on_mesh(load_network(config, "inception"), sharding.local_mesh())
    reference = Reference(config)
    with config_errors("evaluation.statistics"):
        if epath.Path(path).exists():
            if fid.load(path).reference != reference.digest(*network.identity):
                raise ValueError(
                    f"{path} exists, but is not of these images and this network; name another "
                    "file, or remove it"
                )
            print(f"Nothing to do: {path} exists.")
            return
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
    statistics, _ = describe(network, reference)
    if statistics.rank_deficient:
        logging.warning("fewer images than features: FID against them is too large")
    if jax.process_index() == 0:
        with config_errors("evaluation.statistics"):
            statistics.save(path)
        print(f"Mean and covariance of {network.name} over {statistics.count} images in {path}")
