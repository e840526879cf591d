"""Reporter of diffusion training: sample grids and evaluations."""

from __future__ import annotations

import numpy as np
from jax.sharding import Mesh

from condiff_jax.config.build import with_fields
from condiff_jax.config.schema import Config
from condiff_jax.data.pipeline import unseen_source
from condiff_jax.evaluation.evaluate import Evaluation
from condiff_jax.evaluation.records import summary
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.runs.workdir import Workdir
from condiff_jax.sampling.image_grid import caption_grid
from condiff_jax.sampling.requests import create_batch, guidance_scale, prompts_or_labels, titles
from condiff_jax.sampling.sampler import Sampler
from condiff_jax.training.reporters.base import Log


def example_captions(config: Config, n: int) -> list[str]:
    """First n different captions of the validation data, or else of the training data."""
    source = unseen_source(config)
    captions: dict[str, None] = {}
    for i in range(min(len(source), 20 * n)):
        captions.setdefault(source[i]["caption"] or "(no caption)")
        if len(captions) == n:
            break
    return list(captions)


class Reporter(Log):
    """Log of diffusion training with sample grids and evaluations; all hosts sample."""

    def __init__(
        self,
        objective: DiffusionObjective,
        mesh: Mesh,
        folder: Workdir,
        frozen: dict,
        evaluation: Evaluation,
        *,
        first: int = 0,
    ):
        self.objective, self.evaluation = objective, evaluation
        self.config = config = objective.config
        self.sampler = Sampler(objective, mesh, config.sampling, frozen)
        has_prompts = config.sampling.prompts or config.sampling.prompt_file
        if has_prompts or objective.text_encoder is None:
            self.prompts = prompts_or_labels(config, objective)
        else:
            captions = example_captions(config, config.sampling.n)
            self.prompts = [captions[i % len(captions)] for i in range(config.sampling.n)]
        super().__init__(folder, first=first)

    def samples(self, step: int, params: dict, n: int | None = None) -> np.ndarray:
        """Write samples/STEP.png: a grid of n images with prompts or labels, and return them."""
        prompts = self.prompts[: n or self.config.log.samples]
        batch = create_batch(self.objective, prompts, seen=self.folder.load_control())
        images = self.sampler(params, batch, label="sample grid")
        settings = self.config.sampling
        scale = guidance_scale(settings, self.config.data.resolution)
        title = (
            f"step {step}, {settings.sampler} {settings.steps} steps, "
            f"guidance {scale:g}, control guidance {settings.control_guidance:g}"
        )
        if settings.classifier:
            title += f", classifier guidance {settings.classifier_guidance:g}"
        self.image(step, caption_grid(images, titles(self.objective, prompts), title=title))
        return images

    def finish(self, step: int, params: dict) -> dict | None:
        """Evaluate if the config has metrics, write the final grid, and return the record.

        The grid is written last, because its file marks a finished run.
        """
        lines = [f"Finished {step} steps."]
        record = None
        if self.config.evaluation.metrics:
            record = self.evaluate(step, params, self.evaluation)
            lines += summary(record)
        self.samples(step, params, self.config.sampling.n)
        self.close([*lines, f"  images       {self.folder.grid(step)}"])
        return record

    def evaluate_early(self, step: int, params: dict) -> None:
        """Evaluate during training, on evaluation.every_samples images."""
        samples = self.config.evaluation.every_samples
        config = with_fields(self.config, {"evaluation.samples": samples})
        self.evaluate(step, params, self.evaluation.at(config))

    def evaluate(self, step: int, params: dict, evaluation: Evaluation) -> dict:
        """Return the record of an evaluation; if it is missing, measure and log it."""
        if record := evaluation.find(step):
            return record
        record = evaluation.measure(self.sampler.at(evaluation.config), params, step)
        if self.chief:
            for name, value in record["metrics"].items():
                if value is not None:
                    self.events.add_scalar(f"evaluation/{name}", value, step)
        return record
