"""Reporter of classifier training: accuracy on validation images by noise level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.data.augment import center
from condiff_jax.data.pipeline import unseen_source
from condiff_jax.objectives.classification import QUARTERS, ClassificationObjective
from condiff_jax.runtime.files import append_json
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.training.reporters.base import Log

IMAGES = 256  # number of validation images to measure on
BATCH = 64
COLUMNS = 8  # images of a grid at each noise level


class Reporter(Log):
    """Log of classifier training with predictions on validation images at four noise levels."""

    def __init__(
        self,
        objective: ClassificationObjective,
        mesh: Any,
        folder: Any,
        frozen: dict,
        evaluation: Any,
        *,
        first: int = 0,
    ):
        super().__init__(folder, first=first)
        self.objective = objective
        self.frozen = frozen
        source = unseen_source(objective.config)
        records = [source[i] for i in range(min(IMAGES, len(source)))]
        side = objective.config.data.resolution
        self.images = np.stack([center(record["image"], side) for record in records])
        self.labels = np.array([record["label"] for record in records], np.int32)
        self.classify = jax.jit(self._classify)

    def _classify(self, params: dict, frozen: dict, batch: dict, t: jax.Array, key: jax.Array):
        """Return (probabilities (B, classes), noised images uint8 (B, R, R, 3)) at one t ()."""
        params = {**params, **frozen}
        n = batch["label"].shape[0]
        noise = self.objective.draw_noise(key, n) | {"t": jnp.full((n,), t)}
        logits, x = self.objective.predict(params, batch, noise)
        images = self.objective.autoencoder.decode(params.get("autoencoder"), x)
        return jax.nn.softmax(logits), images

    def measure(self, params: dict) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Return (probabilities (4, N, classes), noised images (4, N, R, R, 3), accuracies)."""
        total = self.objective.schedule.timesteps
        key = jax.random.key(self.objective.config.seed)
        levels = []
        for quarter in range(QUARTERS):
            t = jnp.int32((2 * quarter + 1) * total // (2 * QUARTERS))
            parts = []
            for start in range(0, len(self.labels), BATCH):
                rows = slice(start, start + BATCH)
                batch = {"image": self.images[rows], "label": self.labels[rows]}
                batch_key = jax.random.fold_in(key, start)
                outputs = self.classify(params, self.frozen, batch, t, batch_key)
                parts.append(jax.device_get(outputs))
            levels.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        probabilities, images = (np.stack(part) for part in zip(*levels, strict=True))
        rates = (probabilities.argmax(-1) == self.labels).mean(1)
        values = {f"accuracy_{i + 1}": float(rate) for i, rate in enumerate(rates)}
        return probabilities, images, {"accuracy": float(rates.mean()), **values}

    def samples(self, step: int, params: dict) -> dict[str, float]:
        """Write samples/STEP.png: validation images at four noise levels with predicted classes.

        The accuracies are written to evaluation.jsonl and returned.
        """
        probabilities, images, values = self.measure(params)
        if self.chief:
            append_json(self.folder.evaluation, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(f"validation/{name}", value, step)
        n = min(COLUMNS, len(self.labels))
        classes = self.objective.vocabulary.classes
        shown = probabilities[:, :n].reshape(-1, probabilities.shape[-1])
        captions = [f"{classes[p.argmax()]} {p.max():.0%}" for p in shown]
        title = f"step {step}: {describe(values)}"
        grid = images[:, :n].reshape(-1, *images.shape[2:])
        self.image(step, caption_grid(grid, captions, columns=n, title=title))
        return values

    def finish(self, step: int, params: dict) -> None:
        """Write the last images and print the accuracies."""
        text = describe(self.samples(step, params))
        lines = [f"Finished {step} steps. On {len(self.labels)} images: {text}"]
        self.close([*lines, f"  images       {self.folder.grid(step)}"])


def describe(values: dict[str, float]) -> str:
    """Format the accuracies of `Reporter.measure`."""
    rates = ", ".join(f"{values[f'accuracy_{i + 1}']:.1%}" for i in range(QUARTERS))
    return f"accuracy {values['accuracy']:.1%}; from little to much noise {rates}"
