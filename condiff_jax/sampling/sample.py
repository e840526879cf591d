"""Sampling: prompts or classes and control values in, pictures out; sample i depends on i alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image

from condiff_jax import runs
from condiff_jax.config.schema import Config
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.requests import asked_for, requests, titles
from condiff_jax.sampling.sampler import Sampler


def run(config: Config, workdir: str) -> epath.Path:
    """Mode `sample`: PNGs and a grid from the newest checkpoint; returns the folder."""
    trained = runs.load(workdir, config)
    objective, step = trained.objective, trained.step
    asked = asked_for(config, objective)
    sampler = Sampler(objective, trained.mesh, config.sampling, trained.frozen)
    pictures = sampler(
        trained.params, requests(objective, asked, seen=trained.folder.load_control())
    )
    out = trained.folder.samples / f"{step}-seed{config.sampling.seed}"
    if jax.process_index() == 0:
        out.mkdir(parents=True, exist_ok=True)
        save_pictures(out, pictures, titles(objective, asked))
        print(f"{len(pictures)} pictures of step {step} and grid.png in {out}")
    return out


def save_pictures(out: epath.Path, pictures: np.ndarray, captions: Sequence[str]) -> None:
    """000000.png, 000001.png, ..., captions.txt and grid.png in the folder `out`."""
    for i, picture in enumerate(pictures):
        save_png(out / f"{i:06d}.png", Image.fromarray(picture))
    (out / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    save_png(out / "grid.png", caption_grid(pictures, captions))


def save_png(path: epath.Path, image) -> None:
    """Write a PIL image as PNG, locally or remotely."""
    with path.open("wb") as file:
        image.save(file, format="PNG")
