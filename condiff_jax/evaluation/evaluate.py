"""Evaluation of trained models (mode `evaluate`, and at the end of training).

One line of evaluation.jsonl is one evaluation: its metrics, and everything that they depend on.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from condiff_jax import runs
from condiff_jax.config.build import from_text, with_fields
from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import Config
from condiff_jax.evaluation import controllability, image_quality, protocols
from condiff_jax.evaluation.metrics import fid, shapes_features
from condiff_jax.evaluation.metrics.clip_score import ClipScore
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.records import describe, find_record, measurement_dir, summary
from condiff_jax.evaluation.reference import Reference
from condiff_jax.objectives.validate import validate
from condiff_jax.pretrained import lpips
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.runtime.files import append_json
from condiff_jax.sampling.sample import save_png
from condiff_jax.sampling.sampler import Sampler

MEASURES = (
    ({"prompt_accuracy"}, controllability.prompt_accuracy),
    ({"size_response"}, controllability.size_response),
    (image_quality.NETWORK.keys(), image_quality.measure),
)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The evaluation of `config.evaluation`, with networks loaded and reference data opened.

    networks: on the devices of all processes; local_networks: on those of this process, for its
    share of the data. identity: what records depend on besides the step, see `records.describe`.
    """

    config: Config
    folder: Workdir
    networks: dict[str, FeatureNetwork | ClipScore]
    local_networks: dict[str, FeatureNetwork | ClipScore]
    reference: Reference | None
    identity: dict[str, Any]

    @classmethod
    def create(cls, config: Config, folder: Workdir, mesh: Mesh) -> Evaluation:
        """Check the config, load networks and open data; ConfigError that names a bad field."""
        _check_fields(config)
        networks = image_quality.create_networks(config)
        reference = _reference(config)
        _check_data(config, networks, reference)
        local_mesh = sharding.local_mesh()
        return cls(
            config,
            folder,
            networks={name: image_quality.on_mesh(n, mesh) for name, n in networks.items()},
            local_networks={
                name: image_quality.on_mesh(n, local_mesh) for name, n in networks.items()
            },
            reference=reference,
            identity=describe(config, networks, reference),
        )

    def at(self, config: Config) -> Evaluation:
        """Return the evaluation with other fields of `sampling` or another number of samples."""
        reference = self.reference
        if config.evaluation != self.config.evaluation:
            reference = _reference(config)
            _check_data(config, self.networks, reference)
        identity = describe(config, self.networks, reference)
        return dataclasses.replace(self, config=config, reference=reference, identity=identity)

    def find(self, step: int) -> dict[str, Any] | None:
        """Find the record at a step; None if it, or an image of evaluation.save, is missing."""
        identity = self.identity | {"step": step}
        if not image_quality.saved(measurement_dir(self.folder, identity), self.config):
            return None
        return find_record(self.folder, identity)

    def measure(self, sampler: Sampler, params: dict, step: int) -> dict[str, Any]:
        """Run all metrics, append the record to evaluation.jsonl, save grids; return the record.

        A killed measurement resumes, see `image_quality.generate`.
        """
        start = time.perf_counter()
        identity = {"step": step, **self.identity}
        parts = measurement_dir(self.folder, identity)
        values, grids = {}, {}
        for names, measure in MEASURES:
            if names & set(self.config.evaluation.metrics):
                more_values, more_grids = measure(self, sampler, params, parts)
                values |= more_values
                grids |= more_grids
        paths = {name: f"samples/{parts.name}-{name}.png" for name in grids}
        seconds = round(time.perf_counter() - start, 1)
        record = identity | {"metrics": values, "pictures": paths, "seconds": seconds}
        if jax.process_index() == 0:
            self.folder.samples.mkdir(parents=True, exist_ok=True)
            for name, path in paths.items():
                save_png(self.folder.path / path, grids[name])
            append_json(self.folder.evaluation, record)
        image_quality.delete_parts(parts)
        return record


def _reference(config: Config) -> Reference | None:
    """Open the reference data of the metrics; None if they need none."""
    metrics = set(config.evaluation.metrics)
    prompts = "size_response" in metrics and config.data.name != "shapes"
    return Reference(config) if prompts or metrics & image_quality.NETWORK.keys() else None


def _check_fields(config: Config) -> None:
    """Raise ConfigError where metrics do not fit the data or their files are missing."""
    metrics = set(config.evaluation.metrics)
    shapes_only = metrics & {"prompt_accuracy", "frechet_shapes"}
    if shapes_only and config.data.name != "shapes":
        names = ", ".join(sorted(shapes_only))
        raise ConfigError("evaluation.metrics", f"{names} need data.name=shapes")
    if shapes_only and config.data.resolution < shapes_features.MIN_SIDE:
        raise ConfigError(
            "data.resolution",
            f"must be at least {shapes_features.MIN_SIDE} for prompt_accuracy and "
            f"frechet_shapes, got {config.data.resolution}",
        )
    if "clip_score" in metrics and config.data.semantics != "text":
        raise ConfigError("evaluation.metrics", "clip_score needs data.semantics=text")
    if "size_response" in metrics and config.evaluation.lpips:
        with config_errors("evaluation.lpips"):
            lpips.load_weights(config.evaluation.lpips)


def _check_data(config: Config, networks: dict, reference: Reference | None) -> None:
    """Raise ConfigError for too few images, or statistics that do not fit the network."""
    settings = config.evaluation
    if networks:
        samples, references = settings.samples, len(reference.numbers)
        needed = image_quality.min_samples(settings.metrics)
        if min(samples, references) < needed:
            raise ConfigError(
                "evaluation.samples",
                f"the metrics need {needed} images or more, got {samples} and {references} of "
                f"evaluation.reference={settings.reference}",
            )
    if settings.statistics and "inception" in networks:
        network = networks["inception"]
        with config_errors("evaluation.statistics"):
            expected = fid.Statistics(
                mean=np.zeros(network.width),
                covariance=np.zeros((0, 0)),
                network=network.name,
                sha256=network.sha256,
                resolution=(config.data.resolution,) * 2,
                resize=network.resize,
            )
            fid.check_alike(expected, fid.load(settings.statistics))


def grid(config: Config) -> dict[str, Config]:
    """Return the configs of evaluation.grid by the fields that they change, such as "guidance 2.0".

    evaluation.grid: "field=value,value;..." with fields of `sampling`. Without a grid the config
    itself, as "". ConfigError for fields or values that `sampling` cannot have.
    """
    axes = []
    for part in filter(None, config.evaluation.grid.split(";")):
        name, _, texts = part.partition("=")
        if not texts:
            raise ConfigError("evaluation.grid", f"{part!r} is not field=value,value of sampling")
        field = f"sampling.{name.strip()}"
        try:
            axes.append([(field, from_text(field, text.strip())) for text in texts.split(",")])
        except ConfigError as error:
            raise ConfigError("evaluation.grid", str(error)) from None
    points = {}
    for point in itertools.product(*axes):
        name = ", ".join(f"{field.removeprefix('sampling.')} {value}" for field, value in point)
        points[name] = with_fields(config, dict(point))
        validate(points[name])
    return points


def run(config: Config, workdir: str) -> list[dict[str, Any]]:
    """Run mode `evaluate`: return the records of the newest checkpoint, one per point of `grid`.

    Existing records are not measured again.
    """
    if config.evaluation.protocol:
        if jax.process_index() == 0:
            print(protocols.summary(config))
        config = protocols.apply(config)
    if not config.evaluation.metrics:
        raise ConfigError("evaluation.metrics", "empty; name what to measure")
    points = grid(config)
    mesh = sharding.create_mesh(config.parallel.fsdp)
    evaluation = Evaluation.create(config, Workdir(workdir), mesh)
    trained = runs.load(workdir, config, mesh=mesh)
    step = trained.step
    if step > config.steps:
        raise ConfigError(
            "steps",
            f"{workdir} has trained to step {step}, past {config.steps}; set steps={step}",
        )
    sampler, records = None, []
    for name, point in points.items():
        evaluation = evaluation.at(point)
        record = evaluation.find(step)
        if record:
            path = trained.folder.evaluation
            print(f"Step {step} is already measured with these settings, see {path}:")
        else:
            sampler = sampler or Sampler(trained.objective, mesh, config.sampling, trained.frozen)
            record = evaluation.measure(sampler.at(point), trained.params, step)
        if jax.process_index() == 0:
            print("\n".join([*([f"{name}:"] if name else []), *summary(record)]))
        records.append(record)
    return records
