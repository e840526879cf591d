"""Evaluation of trained models: what was asked for, what came out, and how it was made.

One line of evaluation.jsonl is one evaluation: its numbers, and all that they depend on.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
import numpy as np

from condiff_jax.config.build import from_text, with_fields
from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import Config
from condiff_jax.evaluation import image_quality, protocols
from condiff_jax.evaluation.controllability import MEASURES
from condiff_jax.evaluation.metrics import fid, shapes_features
from condiff_jax.evaluation.records import describe, find_record, measurement_dir, summary
from condiff_jax.evaluation.reference import Reference
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.validate import validate
from condiff_jax.pretrained import lpips
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.runtime.files import append_json
from condiff_jax.sampling.sample import save_png
from condiff_jax.sampling.sampler import Sampler


def check(config: Config) -> None:
    """ConfigError where the evaluation that the config asks for cannot be made."""
    settings, metrics = config.evaluation, set(config.evaluation.metrics)
    shapes_only = metrics & {"prompt_accuracy", "frechet_shapes"}
    if shapes_only and config.data.name != "shapes":
        names = ", ".join(sorted(shapes_only))
        raise ConfigError("evaluation.metrics", f"{names} need data.name=shapes")
    if shapes_only and config.data.resolution < shapes_features.LEAST_SIDE:
        raise ConfigError(
            "data.resolution",
            f"must be at least {shapes_features.LEAST_SIDE} for prompt_accuracy and "
            f"frechet_shapes, got {config.data.resolution}",
        )
    if "clip_score" in metrics and config.data.semantics != "text":
        raise ConfigError("evaluation.metrics", "clip_score needs data.semantics=text")
    if metrics & image_quality.NETWORK.keys():
        networks, reference = image_quality.create_networks(config), Reference(config)
        ours, theirs, least = (
            settings.samples,
            len(reference.numbers),
            image_quality.min_samples(metrics),
        )
        if min(ours, theirs) < least:
            raise ConfigError(
                "evaluation.samples",
                f"the metrics need {least} images or more, got {ours} and {theirs} of "
                f"evaluation.reference={settings.reference}",
            )
        if settings.statistics and "inception" in networks:
            with config_errors("evaluation.statistics"):
                network, side = networks["inception"], (config.data.resolution,) * 2
                about = network.name, network.sha256, side, None, network.resize
                mean = np.zeros(network.width)
                ours = fid.Statistics(mean, np.zeros((0, 0)), None, *about)
                fid.check_alike(ours, fid.load(settings.statistics))
    if "size_response" in settings.metrics and settings.lpips:
        with config_errors("evaluation.lpips"):
            lpips.load_weights(settings.lpips)


def measure(
    sampler: Sampler, params: dict, step: int, folder: Workdir, *, ema: bool
) -> dict[str, Any]:
    """Run config.evaluation.metrics: one record in evaluation.jsonl, with pictures in samples/.

    A measurement that was killed goes on where it was, see `fidelity.generate`.

    ema: whether `params` are the averaged ones, for the record. ConfigError as from `check`.
    """
    config, start = sampler.system.config, time.perf_counter()
    check(config)
    identity = describe(config, step, ema=ema)
    parts = measurement_dir(folder, identity)
    metrics, grids = {}, {}
    for name, measure_one in MEASURES.items():
        if name in config.evaluation.metrics:
            values, pictures = measure_one(sampler, params, folder, parts)
            metrics |= values
            grids |= pictures
    if image_quality.NETWORK.keys() & set(config.evaluation.metrics):
        metrics |= image_quality.measure(sampler, params, folder, parts)
    pictures = {name: f"samples/{parts.name}-{name}.png" for name in grids}
    if jax.process_index() == 0:
        folder.samples.mkdir(parents=True, exist_ok=True)
        for name, path in pictures.items():
            save_png(folder.path / path, grids[name])
    seconds = round(time.perf_counter() - start, 1)
    record = identity | {"metrics": metrics, "pictures": pictures, "seconds": seconds}
    if jax.process_index() == 0:
        append_json(folder.evaluation, record)
    image_quality.delete_parts(parts)
    return record


def grid(config: Config) -> dict[str, Config]:
    """The configs of evaluation.grid, "field=value,value;..." of sampling, by what they change.

    Without a grid the config itself, as "".

    ConfigError for fields or values that `sampling` cannot have.
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
    """Mode `evaluate`: the records of the newest checkpoint, one for each point of `grid`.

    What was measured before is not measured again.
    """
    if config.evaluation.protocol:
        if jax.process_index() == 0:
            print(protocols.summary(config))
        config = protocols.apply(config)
    if not config.evaluation.metrics:
        raise ConfigError("evaluation.metrics", "empty; name what to measure")
    points = grid(config)
    for point in points.values():
        check(point)
    folder = Workdir(workdir)
    folder.check(config)
    checkpoints, ema = Checkpoints(folder.checkpoints, config), config.sampling.ema
    step = checkpoints.latest
    if step is not None and step > config.steps:
        raise ConfigError(
            "steps",
            f"{workdir} has trained to step {step}, past {config.steps}; set steps={step}",
        )
    sampler, records = None, []
    for name, point in points.items():
        record = None
        if step is not None:
            identity = describe(point, step, ema=ema)
            record = find_record(folder, identity)
            if not image_quality.saved(measurement_dir(folder, identity), config):
                record = None  # for the pictures
        if record:
            print(f"Step {step} is already measured so, in {folder.evaluation}:")
        else:
            if sampler is None:
                mesh = sharding.create_mesh(config.parallel.fsdp)
                system = create_system(config, folder.load_vocabulary())
                step, params = checkpoints.restore_params(system, mesh, ema=ema)
                frozen = sharding.put(mesh, folder.load_frozen(system))
                sampler = Sampler(system, mesh, config.sampling, frozen)
            record = measure(sampler.at(point), params, step, folder, ema=ema)
        if jax.process_index() == 0:
            print("\n".join([*([f"{name}:"] if name else []), *summary(record)]))
        records.append(record)
    return records
