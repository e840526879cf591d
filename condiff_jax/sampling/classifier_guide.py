"""The classifier of noised pictures p(y | x_t, t), and how a trained one guides a denoiser."""

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

# What must be the same for a classifier and a denoiser to see the same x_t at the same t.
FIELD = "sampling.classifier"
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
    """log p(y | x_t, t) (B,) as a function of x_t, t and the condition, whose class is y."""

    def of(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        logits = network.apply({"params": params}, x, t)
        return -optax.softmax_cross_entropy_with_integer_labels(logits, cond.semantics)

    return of


@contextlib.contextmanager
def _classifier_errors():
    """Turn errors in reading the classifier's run into those of the field that names it."""
    try:
        yield
    except ConfigError as error:
        if error.field == FIELD:
            raise
        raise ConfigError(FIELD, str(error)) from error


def load_run(settings: Sampling, mesh: Mesh | None = None) -> runs.Run:
    """The run of the classifier that guides; ConfigError where there is none."""
    with _classifier_errors():
        return runs.load(
            settings.classifier, objective="classification", ema=settings.ema, mesh=mesh
        )


def load(objective: DiffusionObjective, mesh: Mesh, settings: Sampling) -> tuple[nn.Module, dict]:
    """(network, parameters) of the classifier in the work directory `sampling.classifier`.

    ConfigError unless it fits the denoiser: classes, pictures, latents and noise levels.
    """
    run = load_run(settings, mesh)
    with _classifier_errors():
        _check(run.objective, objective, run.folder)
        return run.objective.model, run.params["classifier"]


def _check(found: ClassificationObjective, objective: DiffusionObjective, folder: Workdir) -> None:
    ours, theirs = objective.vocabulary.classes, found.vocabulary.classes
    if ours != theirs:
        raise ConfigError(
            FIELD,
            f"its classes ({_some(theirs)}) are not those of this model ({_some(ours)})",
        )
    fields = SPACE
    if not np.array_equal(found.schedule.alpha_bar, objective.schedule.alpha_bar):
        fields += SCHEDULE
    for field in fields:
        before, after = (get(one.config, field) for one in (found, objective))
        if before != after:
            raise ConfigError(
                FIELD, f"it has {field}={before}, this model {after}; train one like it"
            )
    if "autoencoder" in objective.frozen:
        known = json.loads(folder.encoders.read_text())["autoencoder"]
        if known != weights.sha256(objective.frozen["autoencoder"].files()):
            raise ConfigError(
                FIELD,
                "it was trained in the latents of other files than those at autoencoder.path="
                f"{objective.config.autoencoder.path}",
            )


def _some(classes: tuple[str, ...]) -> str:
    return f"{len(classes)}: {', '.join(classes[:2])}, ..."


def describe(config: Config) -> dict[str, Any]:
    """What an evaluation says of the classifier that guides it; {} without one."""
    settings = config.sampling
    if not settings.classifier:
        return {}
    run = load_run(settings)
    step = newest(run.folder.checkpoints)
    return {
        "classifier": {"config": digest(run.config), "step": step},
        "classifier_guidance": settings.classifier_guidance,
    }
