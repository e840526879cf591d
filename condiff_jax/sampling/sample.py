"""Mode `sample`: images for prompts or labels and control values; sample i depends on i alone."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from PIL import Image

from condiff_jax import runs
from condiff_jax.config.schema import Config
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.requests import create_batch, prompts_or_labels, titles
from condiff_jax.sampling.sampler import Sampler


def run(config: Config, workdir: str) -> epath.Path:
    """Sample PNGs and a grid from the newest checkpoint, and return their folder."""
    trained = runs.load(workdir, config)
    objective, step = trained.objective, trained.step
    prompts = prompts_or_labels(config, objective)
    sampler = Sampler(objective, trained.mesh, config.sampling, trained.frozen)
    batch = create_batch(objective, prompts, seen=trained.folder.load_control())
    images = sampler(trained.params, batch)
    folder = trained.folder.samples / f"{step}-seed{config.sampling.seed}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        save_images(folder, images, titles(objective, prompts))
        print(f"{len(images)} images of step {step} and grid.png in {folder}")
    return folder


def save_images(folder: epath.Path, images: np.ndarray, captions: Sequence[str]) -> None:
    """Write 000000.png, 000001.png, ..., captions.txt and grid.png into a folder."""
    for i, image in enumerate(images):
        save_png(folder / f"{i:06d}.png", Image.fromarray(image))
    (folder / "captions.txt").write_text("".join(f"{caption}\n" for caption in captions))
    save_png(folder / "grid.png", caption_grid(images, captions))


def save_png(path: epath.Path, image: Image.Image) -> None:
    """Write a PIL image as PNG, locally or remotely."""
    with path.open("wb") as file:
        image.save(file, format="PNG")
