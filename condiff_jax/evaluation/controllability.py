"""How images follow prompts, labels and control metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from condiff_jax.data import shapes
from condiff_jax.evaluation.metrics import prompt, response
from condiff_jax.evaluation.reference import Reference
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.pretrained import lpips
from condiff_jax.runtime.files import load_cached, write
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.requests import asked_control, requests, titles
from condiff_jax.sampling.sampler import Sampler

if TYPE_CHECKING:
    from condiff_jax.evaluation.evaluate import Evaluation

# Numbers of the first samples of each metric: they share noise neither with each other nor with
# the grids, which start at 0.
FIRST_INDEX = {"prompt_accuracy": 10**6, "size_response": 2 * 10**6}
SIZE_PART = 32  # prompts of size_response whose pictures are in memory at a time


def subjects(objective: DiffusionObjective, n: int, reference: Reference | None) -> list[Any]:
    """What to sample in turn: the scenes of n unseen prompts, or n times the next label."""
    if objective.text_encoder is None:
        return [i % len(objective.vocabulary.classes) for i in range(n)]
    if objective.config.data.name == "shapes":
        return shapes.prompts(n)
    return reference.asked(n, objective)


def asked_for(objective: DiffusionObjective, wanted: Sequence[Any]) -> list[Any]:
    """The prompts of `subjects`, or their classes."""
    return [getattr(subject, "caption", subject) for subject in wanted]


def prompt_accuracy(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict, dict]:
    """Share of pictures that show what they were asked for, by attribute, and a grid of them."""
    objective, config = sampler.objective, sampler.objective.config
    first = FIRST_INDEX["prompt_accuracy"]
    wanted = subjects(objective, config.evaluation.prompts, evaluation.reference)
    asked = asked_for(objective, wanted)
    batch = requests(objective, asked, first=first, seen=evaluation.folder.load_control())
    pictures = sampler(params, batch, first=first, label="prompt accuracy")
    if objective.text_encoder is None:
        values = prompt.class_accuracy(pictures, wanted, objective.vocabulary.classes)
    else:
        values = prompt.prompt_accuracy(pictures, wanted)
    shown = pictures[: config.sampling.n]
    grid = caption_grid(shown, titles(objective, asked[: len(shown)]))
    return values, {"grid": grid}


def size_response(
    evaluation: Evaluation, sampler: Sampler, params: dict, parts: epath.Path
) -> tuple[dict, dict]:
    """How pictures change with size control alone, and grids of that (Fig. 2), and of flips."""
    objective, config = sampler.objective, sampler.objective.config
    settings, resolution = config.evaluation, config.data.resolution
    wanted = asked_for(objective, subjects(objective, settings.size_prompts, evaluation.reference))
    distance = lpips.create(settings.lpips) if settings.lpips else None
    sides = [{"height": size, "width": size, "aspect": 1.0} for size in settings.sizes]
    found, shown = [], wanted[:SIZE_PART]
    grids = {}
    for low in tqdm(
        range(0, len(wanted), SIZE_PART), desc="sizes", disable=jax.process_index() != 0
    ):
        some, file = wanted[low : low + SIZE_PART], parts / f"sizes-{low:08d}.json"
        if values := load_cached(file, json.loads):  # the first part is made again, for the grids
            found.append((len(some), values))
            continue
        pictures = controlled(sampler, params, some, sides, "sizes", low)
        found.append(
            (len(some), response.size_response(pictures, settings.sizes, resolution, distance))
        )
        if not low:
            names = [f"{n} px" for n in settings.sizes]
            grids["sizes"] = comparison(objective, pictures, shown, names)
        elif jax.process_index() == 0:
            parts.mkdir(parents=True, exist_ok=True)
            write(file, json.dumps(found[-1][1]))
    if "flip" in config.conditioning.control:
        flips = [{"flip": 0.0}, {"flip": 1.0}]
        pictures = controlled(sampler, params, shown, flips, "flips", 0)
        grids["flip"] = comparison(objective, pictures, shown, ["not flipped", "flipped"])
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
    base, columns = asked_control(sampler.objective.config), []
    for variant in tqdm(variants, desc=label, leave=False, disable=jax.process_index() != 0):
        control = {
            name: np.full(len(asked), value, np.float32) for name, value in (base | variant).items()
        }
        batch = requests(sampler.objective, asked, control)
        index = FIRST_INDEX["size_response"] + first
        columns.append(sampler(params, batch, first=index, label=label))
    return np.stack(columns, 1)


def comparison(
    objective: DiffusionObjective, pictures: np.ndarray, asked: Sequence[Any], names: Sequence[str]
):
    """A grid of pictures (P, V, R, R, 3): a row for each request, a column for each name."""
    captions = [
        f"{name}: {title}" if column == 0 else name
        for title in titles(objective, asked)
        for column, name in enumerate(names)
    ]
    pictures = pictures.reshape(-1, *pictures.shape[2:])
    return caption_grid(
        pictures, captions, columns=len(names), title="Same noise, different control"
    )
