"""Classifier guidance: loading a trained classifier p(y | x_t, t) of noised images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from condiff_jax import runs
from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import digest
from condiff_jax.config.schema import Config, Sampling
from condiff_jax.objectives.classification import ClassificationObjective
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.pretrained import weights
from condiff_jax.runs.checkpoint import newest
from condiff_jax.runs.workdir import Workdir

FIELD = "sampling.classifier"
# Fields in which classifier and denoiser must agree, so that x_t at t is the same for both.
SPACE = (
    "data.resolution",
    "autoencoder.name",
    "autoencoder.size",
    "autoencoder.scale",
    "autoencoder.shift",
)
SCHEDULE = (
    "diffusion.timesteps",
    "diffusion.schedule",
    "diffusion.beta_start",
    "diffusion.beta_end",
    "diffusion.base_resolution",
)


def log_prob(network: nn.Module, params: dict) -> Callable:
    """Return the function (x_t, t, cond) -> log p(y | x_t, t) (B,), where cond.semantics is y."""

    def class_log_prob(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        logits = network.apply({"params": params}, x, t)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, cond.semantics)

    return class_log_prob


@contextlib.contextmanager
def _classifier_errors():
    """Turn errors in loading the classifier's run into errors of the field sampling.classifier."""
    try:
        yield
    except ConfigError as error:
        if error.field == FIELD:
            raise
        raise ConfigError(FIELD, str(error)) from error


def load_run(settings: Sampling, mesh: Mesh | None = None) -> runs.Run:
    """Load the run of the guiding classifier; ConfigError where there is none."""
    with _classifier_errors():
        return runs.load(
            settings.classifier, objective="classification", ema=settings.ema, mesh=mesh
        )


def load(objective: DiffusionObjective, mesh: Mesh, settings: Sampling) -> tuple[nn.Module, dict]:
    """Load (network, parameters) of the classifier in the work directory `sampling.classifier`.

    ConfigError unless it fits the denoiser: classes, image size, latents and noise levels.
    """
    run = load_run(settings, mesh)
    with _classifier_errors():
        _check_compatible(run.objective, objective, run.folder)
        return run.objective.model, run.params["classifier"]


def _check_compatible(
    classifier: ClassificationObjective, denoiser: DiffusionObjective, folder: Workdir
) -> None:
    """Raise ConfigError unless a classifier, trained in `folder`, can guide a denoiser."""
    classes, expected = classifier.vocabulary.classes, denoiser.vocabulary.classes
    if classes != expected:
        raise ConfigError(
            FIELD,
            f"its classes ({_abbreviate(classes)}) are not those of this model "
            f"({_abbreviate(expected)})",
        )
    fields = SPACE
    if not np.array_equal(classifier.schedule.alpha_bar, denoiser.schedule.alpha_bar):
        fields += SCHEDULE
    for field in fields:
        value, expected = get(classifier.config, field), get(denoiser.config, field)
        if value != expected:
            raise ConfigError(
                FIELD, f"it has {field}={value}, this model {expected}; train one like it"
            )
    if "autoencoder" in denoiser.frozen:
        digest = json.loads(folder.encoders.read_text())["autoencoder"]
        if digest != weights.sha256(denoiser.frozen["autoencoder"].files()):
            raise ConfigError(
                FIELD,
                "it was trained in the latents of other files than those at autoencoder.path="
                f"{denoiser.config.autoencoder.path}",
            )


def _abbreviate(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {', '.join(classes[:2])}, ..."


def describe(config: Config) -> dict[str, Any]:
    """Return the fields of an evaluation record about classifier guidance; {} without it."""
    settings = config.sampling
    if not settings.classifier:
        return {}
    run = load_run(settings)
    step = newest(run.folder.checkpoints)
    return {
        "classifier": {"config": digest(run.config), "step": step},
        "classifier_guidance": settings.classifier_guidance,
    }
