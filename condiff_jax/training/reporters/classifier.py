"""What the training of a classifier reports: accuracy on unseen images, by noise level."""

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

PICTURES, BATCH = 256, 64  # of the validation data that progress is measured on


COLUMNS = 8  # pictures that a grid shows at each noise level


class Reporter(Log):
    """The log of a classifier's training: what it says of unseen pictures, at four noise levels."""

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
        self.objective, self.frozen = objective, frozen
        source = unseen_source(objective.config)
        records = [source[i] for i in range(min(PICTURES, len(source)))]
        side = objective.config.data.resolution
        self.images = np.stack([center(record["image"], side) for record in records])
        self.labels = np.array([record["label"] for record in records], np.int32)
        self.look = jax.jit(self._look)

    def _look(self, params: dict, frozen: dict, batch: dict, t: jax.Array, key: jax.Array):
        """(probabilities (B, classes), pictures uint8 (B, R, R, 3)) at one t ()."""
        n, params = batch["label"].shape[0], {**params, **frozen}
        noise = self.objective.draw_noise(key, n) | {"t": jnp.full((n,), t)}
        logits, x = self.objective.predict(params, batch, noise)
        return jax.nn.softmax(logits), self.objective.autoencoder.decode(
            params.get("autoencoder"), x
        )

    def measure(self, params: dict) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """(probabilities (4, N, classes), noised pictures (4, N, R, R, 3), accuracies by name)."""
        total, key = self.objective.schedule.timesteps, jax.random.key(self.objective.config.seed)
        levels = []
        for quarter in range(QUARTERS):
            t, parts = jnp.int32((2 * quarter + 1) * total // (2 * QUARTERS)), []
            for start in range(0, len(self.labels), BATCH):
                some = slice(start, start + BATCH)
                batch = {"image": self.images[some], "label": self.labels[some]}
                own = jax.random.fold_in(key, start)
                parts.append(jax.device_get(self.look(params, self.frozen, batch, t, own)))
            levels.append([np.concatenate(part) for part in zip(*parts, strict=True)])
        probabilities, pictures = (np.stack(part) for part in zip(*levels, strict=True))
        rates = (probabilities.argmax(-1) == self.labels).mean(1)
        values = {f"accuracy_{i + 1}": float(rate) for i, rate in enumerate(rates)}
        return probabilities, pictures, {"accuracy": float(rates.mean()), **values}

    def samples(self, step: int, params: dict) -> dict[str, float]:
        """samples/STEP.png: unseen pictures at four noise levels, and what each is taken for.

        How often that is right is a line of evaluation.jsonl.
        """
        probabilities, pictures, values = self.measure(params)
        if self.chief:
            append_json(self.folder.evaluation, {"step": step, **values})
            for name, value in values.items():
                self.events.add_scalar(f"validation/{name}", value, step)
        n, classes = min(COLUMNS, len(self.labels)), self.objective.vocabulary.classes
        captions = [
            f"{classes[one.argmax()]} {one.max():.0%}" for row in probabilities for one in row[:n]
        ]
        shown = pictures[:, :n].reshape(-1, *pictures.shape[2:])
        title = f"step {step}: {describe(values)}"
        self.picture(step, caption_grid(shown, captions, columns=n, title=title))
        return values

    def finish(self, step: int, params: dict) -> None:
        """The last pictures, and what came out."""
        text = describe(self.samples(step, params))
        lines = [f"Finished {step} steps. On {len(self.labels)} pictures: {text}"]
        self.close([*lines, f"  pictures     {self.folder.grid(step)}"])


def describe(values: dict[str, float]) -> str:
    """What `Reporter.measure` found, for people."""
    rates = ", ".join(f"{values[f'accuracy_{i + 1}']:.1%}" for i in range(QUARTERS))
    return f"class right {values['accuracy']:.1%}; from little to much noise {rates}"
