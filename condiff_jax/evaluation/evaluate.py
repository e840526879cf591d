"""Evaluation of trained models: what was asked for, what came out, and how it was made.

One line of evaluation.jsonl is one evaluation: its numbers, and all that they depend on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from condiff_jax.config.build import from_text, with_fields
from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import Config
from condiff_jax.data import shapes
from condiff_jax.evaluation import image_quality, protocols
from condiff_jax.evaluation.metrics import fid, prompt, response, shapes_features
from condiff_jax.evaluation.reference import Reference, kept
from condiff_jax.objectives.diffusion import System
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.validate import validate
from condiff_jax.pretrained import lpips
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir, append_json, read_json_lines, write
from condiff_jax.runtime import sharding
from condiff_jax.sampling import classifier_guide
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.sample import Sampler, asked_control, requests, save_png, titles

# Numbers of the first samples of each metric: they share noise neither with each other nor with
# the grids, which start at 0.
FIRST_INDEX = {"prompt_accuracy": 10**6, "size_response": 2 * 10**6}
SIZE_PART = 32  # prompts of size_response whose pictures are in memory at a time
# What an evaluation depends on besides the run; records that agree here are the same measurement.
IDENTITY = ("step", "sampling", "evaluation", "features")


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
        ours, theirs, least = settings.samples, len(reference.numbers), image_quality.least(metrics)
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


def describe(config: Config, step: int, *, ema: bool) -> dict[str, Any]:
    """The IDENTITY of the config's evaluation at a step: the fields that its numbers depend on."""
    settings, asked = config.evaluation, config.sampling
    evaluation: dict[str, Any] = {"metrics": sorted(settings.metrics)}
    if "prompt_accuracy" in settings.metrics:
        evaluation |= {"prompts": settings.prompts}
    networks = image_quality.create_networks(config)
    if networks:
        evaluation["samples"] = settings.samples
    prompted = "size_response" in settings.metrics and config.data.name != "shapes"
    if networks or prompted:
        evaluation["reference"] = settings.reference
        evaluation["reference_sha256"] = Reference(config).digest()
        evaluation |= {"path": settings.path} if settings.path else {}
    if settings.statistics and "inception" in networks:
        content = epath.Path(settings.statistics).read_bytes()
        evaluation["statistics"] = hashlib.sha256(content).hexdigest()
    if "size_response" in settings.metrics:
        evaluation |= {"size_prompts": settings.size_prompts, "sizes": list(settings.sizes)}
        if settings.lpips:
            content = epath.Path(settings.lpips).read_bytes()
            evaluation["lpips"] = hashlib.sha256(content).hexdigest()
    names = ("sampler", "steps", "spacing", "eta", "clip", "guidance", "control_guidance")
    names += ("base_resolution", "size", "seed")
    sampling = {name: getattr(asked, name) for name in names}
    sampling |= {"ema": ema, "control": asked_control(config)} | classifier_guide.describe(config)
    if asked.size in ("tied", "untied"):
        sampling["size_range"] = list(asked.size_range)
    features = image_quality.describe_networks(networks)
    return {"step": step, "sampling": sampling, "evaluation": evaluation, "features": features}


def measured(folder: Workdir, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest record of evaluation.jsonl with this identity, None if there is none."""
    for record in reversed(read_json_lines(folder.evaluation)):
        if all(record.get(key) == identity[key] for key in IDENTITY):
            return record
    return None


def own_folder(folder: Workdir, identity: dict[str, Any]) -> epath.Path:
    """Where the measurement with this identity keeps its parts, and pictures if asked."""
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return folder.path / "evaluations" / f"{identity['step']}-{key}"


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
    parts = own_folder(folder, identity)
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
    image_quality.forget(parts)
    return record


def forget_after(folder: Workdir, step: int) -> None:
    """Drop what killed or finished measurements beyond a step have left: weights will be others."""
    for path in (folder.path / "evaluations").glob("*-*"):
        if int(path.name.partition("-")[0]) > step:
            path.rmtree()


def subjects(system: System, n: int) -> list[Any]:
    """What to ask for in turn: the scenes of n unseen prompts, or n times the next class."""
    if system.text_encoder is None:
        return [i % len(system.vocabulary.classes) for i in range(n)]
    if system.config.data.name == "shapes":
        return shapes.prompts(n)
    return Reference(system.config).asked(n, system)


def asked_for(system: System, wanted: Sequence[Any]) -> list[Any]:
    """The prompts of `subjects`, or their classes."""
    return [getattr(subject, "caption", subject) for subject in wanted]


def prompt_accuracy(
    sampler: Sampler, params: dict, folder: Workdir, parts: epath.Path
) -> tuple[dict, dict]:
    """Share of pictures that show what they were asked for, by attribute, and a grid of them."""
    system, config = sampler.system, sampler.system.config
    first = FIRST_INDEX["prompt_accuracy"]
    wanted = subjects(system, config.evaluation.prompts)
    asked = asked_for(system, wanted)
    batch = requests(system, asked, first=first, seen=folder.load_control())
    pictures = sampler(params, batch, first=first, label="prompt accuracy")
    if system.text_encoder is None:
        values = prompt.class_accuracy(pictures, wanted, system.vocabulary.classes)
    else:
        values = prompt.prompt_accuracy(pictures, wanted)
    shown = pictures[: config.sampling.n]
    grid = caption_grid(shown, titles(system, asked[: len(shown)]))
    return values, {"grid": grid}


def size_response(
    sampler: Sampler, params: dict, folder: Workdir, parts: epath.Path
) -> tuple[dict, dict]:
    """How pictures change with size control alone, and grids of that (Fig. 2), and of flips."""
    system, config = sampler.system, sampler.system.config
    settings, resolution = config.evaluation, config.data.resolution
    wanted = asked_for(system, subjects(system, settings.size_prompts))
    distance = lpips.create(settings.lpips) if settings.lpips else None
    sides = [{"height": size, "width": size, "aspect": 1.0} for size in settings.sizes]
    found, shown = [], wanted[:SIZE_PART]
    grids = {}
    for low in tqdm(
        range(0, len(wanted), SIZE_PART), desc="sizes", disable=jax.process_index() != 0
    ):
        some, file = wanted[low : low + SIZE_PART], parts / f"sizes-{low:08d}.json"
        if values := kept(file, json.loads):  # the first part is made again, for the grids
            found.append((len(some), values))
            continue
        pictures = controlled(sampler, params, some, sides, "sizes", low)
        found.append(
            (len(some), response.size_response(pictures, settings.sizes, resolution, distance))
        )
        if not low:
            names = [f"{n} px" for n in settings.sizes]
            grids["sizes"] = comparison(system, pictures, shown, names)
        elif jax.process_index() == 0:
            parts.mkdir(parents=True, exist_ok=True)
            write(file, json.dumps(found[-1][1]))
    if "flip" in config.conditioning.control:
        flips = [{"flip": 0.0}, {"flip": 1.0}]
        pictures = controlled(sampler, params, shown, flips, "flips", 0)
        grids["flip"] = comparison(system, pictures, shown, ["not flipped", "flipped"])
    return response.mean_response(found, settings.sizes), grids


def controlled(
    sampler: Sampler,
    params: dict,
    asked: Sequence[Any],
    variants: Sequence[dict],
    label: str,
    first: int,
) -> np.ndarray:
    """Pictures (P, V, R, R, 3) of P requests under V changes of control, each with one noise.

    first: the number of the first request.
    """
    base, columns = asked_control(sampler.system.config), []
    for variant in tqdm(variants, desc=label, leave=False, disable=jax.process_index() != 0):
        control = {
            name: np.full(len(asked), value, np.float32) for name, value in (base | variant).items()
        }
        batch = requests(sampler.system, asked, control)
        index = FIRST_INDEX["size_response"] + first
        columns.append(sampler(params, batch, first=index, label=label))
    return np.stack(columns, 1)


def comparison(system: System, pictures: np.ndarray, asked: Sequence[Any], names: Sequence[str]):
    """A grid of pictures (P, V, R, R, 3): a row for each request, a column for each name."""
    captions = [
        f"{name}: {title}" if column == 0 else name
        for title in titles(system, asked)
        for column, name in enumerate(names)
    ]
    pictures = pictures.reshape(-1, *pictures.shape[2:])
    return caption_grid(
        pictures, captions, columns=len(names), title="Same noise, different control"
    )


MEASURES = {"prompt_accuracy": prompt_accuracy, "size_response": size_response}


def summary(record: dict[str, Any]) -> list[str]:
    """A record for people, a line a metric."""
    metrics, settings, lines = record["metrics"], record["evaluation"], []
    names = [name for name in (*prompt.ATTRIBUTES, "all") if name in metrics]
    if names:
        rates = ", ".join(f"{name.replace('_', '/')} {metrics[name]:.1%}" for name in names)
        lines.append(f"Prompt accuracy on {settings['prompts']} unseen prompts: {rates}")
    against = f"{settings.get('samples')} pictures against {settings.get('reference')}"
    if "frechet_shapes" in metrics:
        distance = metrics["frechet_shapes"]
        lines.append(f"Frechet distance on shapes features, {against}: {distance:.3f}")
    for network, names in (
        ("inception", ("fid", "kid", "precision", "recall")),
        ("clip", ("clip_score",)),
    ):
        values = [f"{n} {metrics[n]:.4g}" for n in names if n in metrics]
        if values:
            lines.append(f"{record['features'][network]['name']}, {against}: {', '.join(values)}")
    if metrics.get("fid_rank_deficient"):
        lines.append("  (FID with fewer pictures than features: too large, for comparison alone)")
    if "size_l2" in metrics:
        kinds = ("size_l2", "size_l2_hr", "size_lpips", "size_lpips_hr", "sharpness_response")
        values = (f"{k} {metrics[k]:.4f}" for k in kinds if metrics.get(k) is not None)
        sizes = ", ".join(str(size) for size in settings["sizes"])
        lines.append(f"Response to sizes {sizes}: {', '.join(values)}")
    return lines


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
            record = measured(folder, identity)
            if not image_quality.saved(own_folder(folder, identity), config):
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
