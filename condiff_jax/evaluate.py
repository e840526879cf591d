"""Evaluation of trained models: what was asked for, what came out, and how it was made.

One line of evaluation.jsonl is one evaluation: its numbers, and all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from condiff_jax import sharding
from condiff_jax.checkpoint import Checkpoints
from condiff_jax.config import Config, ConfigError
from condiff_jax.data import augment, shapes
from condiff_jax.data.pipeline import create_source
from condiff_jax.grid import caption_grid
from condiff_jax.metrics import lpips, prompt, response, shapes_features
from condiff_jax.metrics.frechet import Moments, frechet_distance
from condiff_jax.sample import Sampler, asked_control, requests, save_png, titles
from condiff_jax.system import System
from condiff_jax.system import create as create_system
from condiff_jax.workdir import Workdir, append_json, read_json_lines

# Numbers of the first samples of each metric: they share noise neither with each other nor with
# the grids, which start at 0.
FIRST_INDEX = {"prompt_accuracy": 10**6, "frechet_shapes": 10**7, "size_response": 2 * 10**6}
# Where the reference of a distribution starts in a split. Training draws from 2**31 pictures, so
# next to none of these is among those that it has seen.
FIRST_RECORD = {"train": 2**30, "validation": 0}
# What an evaluation depends on besides the run; records that agree here are the same measurement.
IDENTITY = ("step", "sampling", "evaluation", "features")


def check(config: Config) -> None:
    """ConfigError where the evaluation that the config asks for cannot be made."""
    settings = config.evaluation
    if settings.metrics and config.data.resolution < shapes_features.LEAST_SIDE:
        raise ConfigError(
            f"config: evaluation.metrics need data.resolution={shapes_features.LEAST_SIDE} or more"
        )
    if "frechet_shapes" in settings.metrics:
        if settings.reference not in FIRST_RECORD:
            raise ConfigError(
                f"config: evaluation.reference={settings.reference} is not there for data.name="
                f"shapes; choose from {', '.join(FIRST_RECORD)}"
            )
        count = len(shapes.Shapes(settings.reference)) - FIRST_RECORD[settings.reference]
        if settings.samples > count:
            raise ConfigError(
                f"config: evaluation.samples={settings.samples}, but evaluation.reference="
                f"{settings.reference} has {count} pictures"
            )
    if "size_response" in settings.metrics and settings.lpips:
        try:
            lpips.load_weights(settings.lpips)
        except (OSError, ValueError) as error:
            raise ConfigError(f"evaluation.lpips: {error}") from error


def describe(config: Config, step: int, *, ema: bool) -> dict[str, Any]:
    """The IDENTITY of the config's evaluation at a step: the fields that its numbers depend on."""
    settings, asked = config.evaluation, config.sampling
    evaluation: dict[str, Any] = {"metrics": sorted(settings.metrics)}
    if "prompt_accuracy" in settings.metrics:
        evaluation |= {"prompts": settings.prompts}
    if "frechet_shapes" in settings.metrics:
        evaluation |= {"samples": settings.samples, "reference": settings.reference}
    if "size_response" in settings.metrics:
        evaluation |= {"size_prompts": settings.size_prompts, "sizes": list(settings.sizes)}
        if settings.lpips:
            content = epath.Path(settings.lpips).read_bytes()
            evaluation["lpips"] = hashlib.sha256(content).hexdigest()
    names = ("sampler", "steps", "spacing", "eta", "clip", "guidance", "control_guidance")
    names += ("base_resolution", "size", "seed")
    sampling = {name: getattr(asked, name) for name in names}
    sampling |= {"ema": ema, "control": asked_control(config)}
    if asked.size in ("tied", "untied"):
        sampling["size_range"] = list(asked.size_range)
    features = shapes_features.sha256() if "frechet_shapes" in settings.metrics else None
    return {"step": step, "sampling": sampling, "evaluation": evaluation, "features": features}


def measured(folder: Workdir, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The newest record of evaluation.jsonl with this identity, None if there is none."""
    for record in reversed(read_json_lines(folder.evaluation)):
        if all(record.get(key) == identity[key] for key in IDENTITY):
            return record
    return None


def measure(
    sampler: Sampler, params: dict, step: int, folder: Workdir, *, ema: bool
) -> dict[str, Any]:
    """Run config.evaluation.metrics: one record, with pictures in samples/; pure but for those.

    ema: whether `params` are the averaged ones, for the record. ConfigError as from `check`.
    """
    config, start = sampler.system.config, time.perf_counter()
    check(config)
    identity = describe(config, step, ema=ema)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    metrics, grids = {}, {}
    bar = tqdm(
        config.evaluation.metrics, desc="evaluate", leave=False, disable=jax.process_index() != 0
    )
    for name in bar:
        bar.set_postfix_str(name)
        values, pictures = MEASURES[name](sampler, params, folder)
        metrics |= values
        grids |= pictures
    pictures = {name: f"samples/{step}-{key}-{name}.png" for name in grids}
    if jax.process_index() == 0:
        folder.samples.mkdir(parents=True, exist_ok=True)
        for name, path in pictures.items():
            save_png(folder.path / path, grids[name])
    seconds = round(time.perf_counter() - start, 1)
    return identity | {"metrics": metrics, "pictures": pictures, "seconds": seconds}


def subjects(system: System, n: int) -> list[Any]:
    """What to ask for in turn: the scenes of n unseen prompts, or n times the next class."""
    if system.text_encoder is not None:
        return shapes.prompts(n)
    return [i % len(system.vocabulary.classes) for i in range(n)]


def asked_for(system: System, wanted: Sequence[Any]) -> list[Any]:
    """The prompts of `subjects`, or their classes."""
    return list(wanted) if system.text_encoder is None else [scene.caption for scene in wanted]


def prompt_accuracy(sampler: Sampler, params: dict, folder: Workdir) -> tuple[dict, dict]:
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


def frechet_shapes(sampler: Sampler, params: dict, folder: Workdir) -> tuple[dict, dict]:
    """Frechet distance on shapes features between a split's pictures and ones asked alike."""
    system, config = sampler.system, sampler.system.config
    settings, first = config.evaluation, FIRST_INDEX["frechet_shapes"]
    source = create_source(config, settings.reference)
    start = FIRST_RECORD[settings.reference]
    reference, asked, parts = Moments(), [], range(0, settings.samples, shapes_features.BATCH)
    for low in tqdm(parts, desc="reference pictures", leave=False, disable=len(parts) < 2):
        high = min(low + shapes_features.BATCH, settings.samples)
        records = [source[start + i] for i in range(low, high)]
        pictures = [augment.center(r["image"], config.data.resolution)[0] for r in records]
        reference.add(shapes_features.features(np.stack(pictures)))
        name = "label" if system.text_encoder is None else "caption"
        asked += [record[name] for record in records]
    batch = requests(system, asked, first=first, seen=folder.load_control())
    generated = Moments()
    pictures = sampler(params, batch, first=first, label="frechet distance")
    generated.add(shapes_features.features(pictures))
    distance = frechet_distance(*reference.result(), *generated.result())
    return {"frechet_shapes": distance}, {}


def size_response(sampler: Sampler, params: dict, folder: Workdir) -> tuple[dict, dict]:
    """How pictures change with size control alone, and grids of that (Fig. 2), and of flips."""
    system, config = sampler.system, sampler.system.config
    settings, resolution = config.evaluation, config.data.resolution
    wanted = asked_for(system, subjects(system, settings.size_prompts))
    distance = lpips.create(settings.lpips) if settings.lpips else None
    sides = [{"height": size, "width": size, "aspect": 1.0} for size in settings.sizes]
    pictures = controlled(sampler, params, wanted, sides, "sizes")
    values = response.size_response(pictures, settings.sizes, resolution, distance)
    grids = {"sizes": comparison(system, pictures, wanted, [f"{n} px" for n in settings.sizes])}
    if "flip" in config.conditioning.control:
        pictures = controlled(sampler, params, wanted, [{"flip": 0.0}, {"flip": 1.0}], "flips")
        grids["flip"] = comparison(system, pictures, wanted, ["not flipped", "flipped"])
    return values, grids


def controlled(
    sampler: Sampler, params: dict, asked: Sequence[Any], variants: Sequence[dict], label: str
) -> np.ndarray:
    """Pictures (P, V, R, R, 3) of P requests under V changes of control, each with one noise."""
    base, columns = asked_control(sampler.system.config), []
    for variant in tqdm(variants, desc=label, leave=False, disable=jax.process_index() != 0):
        control = {
            name: np.full(len(asked), value, np.float32) for name, value in (base | variant).items()
        }
        batch = requests(sampler.system, asked, control)
        columns.append(sampler(params, batch, first=FIRST_INDEX["size_response"], label=label))
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


MEASURES = {
    "prompt_accuracy": prompt_accuracy,
    "frechet_shapes": frechet_shapes,
    "size_response": size_response,
}


def summary(record: dict[str, Any]) -> list[str]:
    """A record for people, a line a metric."""
    metrics, settings, lines = record["metrics"], record["evaluation"], []
    names = [name for name in (*prompt.ATTRIBUTES, "all") if name in metrics]
    if names:
        rates = ", ".join(f"{name.replace('_', '/')} {metrics[name]:.1%}" for name in names)
        lines.append(f"Prompt accuracy on {settings['prompts']} unseen prompts: {rates}")
    if "frechet_shapes" in metrics:
        lines.append(
            f"Frechet distance on shapes features, {settings['samples']} pictures against "
            f"{settings['reference']}: {metrics['frechet_shapes']:.3f}"
        )
    if "size_l2" in metrics:
        kinds = ("size_l2", "size_l2_hr", "size_lpips", "size_lpips_hr", "sharpness_response")
        values = (f"{k} {metrics[k]:.4f}" for k in kinds if metrics.get(k) is not None)
        sizes = ", ".join(str(size) for size in settings["sizes"])
        lines.append(f"Response to sizes {sizes}: {', '.join(values)}")
    return lines


def run(config: Config, workdir: str) -> dict[str, Any]:
    """Mode `evaluate`: the record of the newest checkpoint; measured unless it was before."""
    if not config.evaluation.metrics:
        raise ConfigError("config: evaluation.metrics is empty; name what to measure")
    check(config)
    folder = Workdir(workdir)
    folder.check(config)
    checkpoints, ema = Checkpoints(folder.checkpoints, config), config.sampling.ema
    step = checkpoints.latest
    if step is not None and step > config.steps:
        raise ConfigError(
            f"{workdir} has trained on past steps={config.steps}, to step {step}; set steps={step}"
        )
    found = None if step is None else measured(folder, describe(config, step, ema=ema))
    if found:
        print(f"Step {step} is already measured so, in {folder.evaluation}:")
        record = found
    else:
        mesh = sharding.create_mesh(config.parallel.fsdp)
        system = create_system(config, folder.load_vocabulary())
        step, params = checkpoints.restore_params(system, mesh, ema=ema)
        frozen = jax.device_put(folder.load_frozen(system), sharding.replicated(mesh))
        sampler = Sampler(system, mesh, config.sampling, frozen)
        record = record_measure(sampler, params, step, folder, ema=ema)
    if jax.process_index() == 0:
        print("\n".join(summary(record)))
    return record


def record_measure(
    sampler: Sampler, params: dict, step: int, folder: Workdir, *, ema: bool
) -> dict[str, Any]:
    """`measure`, and its record in evaluation.jsonl."""
    record = measure(sampler, params, step, folder, ema=ema)
    if jax.process_index() == 0:
        append_json(folder.evaluation, record)
    return record
