"""Metrics of control: how well images follow prompts, labels and control metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from PIL import Image
from tqdm import tqdm

from condiff_jax.data import shapes
from condiff_jax.evaluation.metrics import prompt, response
from condiff_jax.evaluation.reference import Reference
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.pretrained import lpips
from condiff_jax.runtime.files import load_cached, write_file
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.requests import asked_control, create_batch, titles
from condiff_jax.sampling.sampler import Sampler

if TYPE_CHECKING:
    from condiff_jax.evaluation.evaluate import Evaluation

# Index of the first sample of each metric. The metrics share noise neither with each other nor with
# the grids, which start at 0.
FIRST_INDEX = {"prompt_accuracy": 10**6, "size_response": 2 * 10**6}
SIZE_PART = 32  # prompts of size_response whose images are in memory at a time


def select_targets(objective: DiffusionObjective, n: int, reference: Reference | None) -> list[Any]:
    """Return n targets to sample: labels in turn, scenes of unseen prompts, or captions.

    Labels for class models; scenes for data.name=shapes; else captions of the reference.
    """
    if objective.text_encoder is None:
        return [i % len(objective.vocabulary.classes) for i in range(n)]
    if objective.config.data.name == "shapes":
        return shapes.prompts(n)
    return reference.captions_or_labels(n, objective)


def prompts_of(targets: Sequence[Any]) -> list[Any]:
    """Return the captions of scenes; captions and labels as they are."""
    return [getattr(target, "caption", target) for target in targets]


def prompt_accuracy(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict, dict]:
    """Measure the share of images that match their prompt, by attribute; and return a grid."""
    objective, config = sampler.objective, sampler.objective.config
    first = FIRST_INDEX["prompt_accuracy"]
    targets = select_targets(objective, config.evaluation.prompts, evaluation.reference)
    prompts = prompts_of(targets)
    batch = create_batch(objective, prompts, first=first, seen=evaluation.folder.load_control())
    images = sampler(params, batch, first=first, label="prompt accuracy")
    if objective.text_encoder is None:
        values = prompt.class_accuracy(images, targets, objective.vocabulary.classes)
    else:
        values = prompt.prompt_accuracy(images, targets)
    shown = images[: config.sampling.n]
    grid = caption_grid(shown, titles(objective, prompts[: len(shown)]))
    return values, {"grid": grid}


def size_response(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict, dict]:
    """Measure how images change with size control alone; grids of sizes (Fig. 2) and of flips.

    parts: a folder of this measurement, in which finished parts are cached.
    """
    objective, config = sampler.objective, sampler.objective.config
    settings, resolution = config.evaluation, config.data.resolution
    prompts = prompts_of(select_targets(objective, settings.size_prompts, evaluation.reference))
    distance = lpips.create(settings.lpips) if settings.lpips else None
    variants = [{"height": size, "width": size, "aspect": 1.0} for size in settings.sizes]
    shown = prompts[:SIZE_PART]
    responses, grids = [], {}
    for low in tqdm(
        range(0, len(prompts), SIZE_PART), desc="sizes", disable=jax.process_index() != 0
    ):
        part = prompts[low : low + SIZE_PART]
        file = parts / f"sizes-{low:08d}.json"
        # The first part has no file: it is sampled again for the grids.
        if values := load_cached(file, json.loads):
            responses.append((len(part), values))
            continue
        images = sample_variants(sampler, params, part, variants, "sizes", low)
        values = response.size_response(images, settings.sizes, resolution, distance)
        responses.append((len(part), values))
        if not low:
            names = [f"{size} px" for size in settings.sizes]
            grids["sizes"] = comparison_grid(objective, images, shown, names)
        elif jax.process_index() == 0:
            parts.mkdir(parents=True, exist_ok=True)
            write_file(file, json.dumps(values))
    if "flip" in config.conditioning.control:
        flips = [{"flip": 0.0}, {"flip": 1.0}]
        images = sample_variants(sampler, params, shown, flips, "flips", 0)
        grids["flip"] = comparison_grid(objective, images, shown, ["not flipped", "flipped"])
    return response.mean_response(responses, settings.sizes), grids


def sample_variants(
    sampler: Sampler,
    params: dict,
    prompts: Sequence[Any],
    variants: Sequence[dict],
    label: str,
    first: int,
) -> np.ndarray:
    """Sample images (P, V, R, R, 3) of P prompts with V changes of control and the same noise.

    first: the index of the first prompt.
    """
    base, columns = asked_control(sampler.objective.config), []
    for variant in tqdm(variants, desc=label, leave=False, disable=jax.process_index() != 0):
        control = {
            name: np.full(len(prompts), value, np.float32)
            for name, value in (base | variant).items()
        }
        batch = create_batch(sampler.objective, prompts, control)
        index = FIRST_INDEX["size_response"] + first
        columns.append(sampler(params, batch, first=index, label=label))
    return np.stack(columns, 1)


def comparison_grid(
    objective: DiffusionObjective, images: np.ndarray, prompts: Sequence[Any], names: Sequence[str]
) -> Image.Image:
    """Draw images (P, V, R, R, 3): one row for each prompt, one column for each name."""
    captions = [
        f"{name}: {title}" if column == 0 else name
        for title in titles(objective, prompts)
        for column, name in enumerate(names)
    ]
    images = images.reshape(-1, *images.shape[2:])
    return caption_grid(images, captions, columns=len(names), title="Same noise, different control")
