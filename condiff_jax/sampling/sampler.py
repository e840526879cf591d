"""Sampler: compiled once, run in batches of one size on a mesh."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from condiff_jax.config.schema import Config, Sampling
from condiff_jax.diffusion.guidance import (
    classifier_gradient,
    classifier_guidance,
    dual_guidance,
    needed_branches,
)
from condiff_jax.diffusion.sampler import SAMPLERS, initial_noise
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.runtime import sharding
from condiff_jax.sampling import classifier_guide
from condiff_jax.sampling.requests import guidance_scale


class SamplingProgram(NamedTuple):
    """Static settings of a compiled sampler; the guidance scales are arguments of the program."""

    sampler: str
    steps: int
    spacing: str
    eta: float
    clip: bool
    seed: int
    needed: tuple[bool, bool, bool]  # see `dual_guidance`
    classifier: nn.Module | None = None  # for classifier guidance

    @classmethod
    def create(
        cls, settings: Sampling, resolution: int, network: nn.Module | None = None
    ) -> tuple[SamplingProgram, np.ndarray]:
        """Create the program of these settings, and its guidance scales (3,) f32.

        Scales: lambda by Eq. 4, beta of Eq. 2, weight of the classifier. network: the classifier.
        """
        scale = guidance_scale(settings, resolution)
        control_scale = settings.control_guidance
        program = cls(
            sampler=settings.sampler,
            steps=settings.steps,
            spacing=settings.spacing,
            eta=settings.eta,
            clip=settings.clip,
            seed=settings.seed,
            needed=needed_branches(scale, control_scale),
            classifier=network,
        )
        scales = [scale, control_scale, settings.classifier_guidance]
        return program, np.array(scales, np.float32)


def noise_keys(seed: int, index: jax.Array) -> jax.Array:
    """Return keys (B, 2) of the samples with indices (B,): for text padding and the sampler."""
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(index)
    return jax.vmap(partial(jax.random.split, num=2))(keys)


def generate(
    params: dict,
    frozen: dict,
    batch: dict,
    index: jax.Array,
    scales: jax.Array,
    *,
    objective: DiffusionObjective,
    program: SamplingProgram,
) -> jax.Array:
    """Sample images uint8 (B, R, R, 3) conditioned on `batch`; pure, to be jitted.

    params, frozen: see `Objective.init` and `Objective.load_frozen`; frozen["classifier"] has the
    parameters of program.classifier. index (B,) int32: the index of each sample; its noise comes
    from (program.seed, index). scales: see `SamplingProgram.create`.
    """
    params = {**params, **frozen}
    keys = noise_keys(program.seed, index)
    text_noise = None
    if objective.text_encoder is not None:
        shape = (objective.config.text_encoder.length, objective.config.text_encoder.width)
        text_noise = jax.vmap(partial(jax.random.normal, shape=shape))(keys[:, 0])
    cond = objective.condition(params, batch, text_noise)
    denoise = dual_guidance(objective.denoise(params), *scales[:2], program.needed)
    options = {}
    if program.classifier is not None:
        log_prob = classifier_guide.log_prob(program.classifier, params["classifier"])
        if program.sampler == "ddpm":
            options["gradient"] = classifier_gradient(log_prob, scales[2])
        else:
            denoise = classifier_guidance(denoise, log_prob, objective.schedule, scales[2])
    x = SAMPLERS[program.sampler](
        denoise,
        objective.schedule,
        initial_noise(keys[:, 1], objective.latent_shape),
        cond,
        keys[:, 1],
        steps=program.steps,
        spacing=program.spacing,
        eta=program.eta,
        clip=objective.autoencoder.bound if program.clip else None,
        **options,
    )
    return objective.autoencoder.decode(params.get("autoencoder"), x)


class Sampler:
    """Run `generate` in batches of one size on a mesh; compiled once for each `SamplingProgram`.

    Loads the classifier of `settings`; ConfigError unless it fits the objective.
    """

    def __init__(
        self,
        objective: DiffusionObjective,
        mesh: Mesh,
        settings: Sampling,
        frozen: dict | None = None,
    ):
        self.objective = objective
        self.mesh = mesh
        self.settings = settings
        self.frozen = frozen or {}
        self._load_classifier()
        self.program = jax.jit(
            sharding.traced_on(mesh, partial(generate, objective=objective)),
            static_argnames="program",
            out_shardings=sharding.replicated(mesh),
        )

    def at(self, config: Config) -> Sampler:
        """Return a sampler of the same model with another config's `sampling`.

        Compiled programs are shared.
        """
        other = copy.copy(self)
        other.objective = dataclasses.replace(self.objective, config=config)
        other.settings = config.sampling
        if other.settings.classifier != self.settings.classifier:
            other._load_classifier()
        return other

    def _load_classifier(self) -> None:
        # A copy: `at` shares this dict between samplers.
        self.frozen = {name: p for name, p in self.frozen.items() if name != "classifier"}
        self.classifier = None
        if self.settings.classifier:
            self.classifier, params = classifier_guide.load(
                self.objective, self.mesh, self.settings
            )
            self.frozen["classifier"] = params

    def __call__(self, params: dict, batch: dict, *, first: int = 0, label: str = "") -> np.ndarray:
        """Sample images uint8 (N, R, R, 3) with the indices first, ..., first + N - 1.

        batch: conditioning inputs, see `create_batch`. label: of the progress bar.
        """
        n = len(batch["label"])
        devices = self.mesh.size
        size = -(-min(self.settings.batch_size, n) // devices) * devices
        parts = []
        resolution = self.objective.config.data.resolution
        program, scales = SamplingProgram.create(self.settings, resolution, self.classifier)
        starts = tqdm(range(0, n, size), desc=label or "sampling", disable=n <= size, leave=False)
        for start in starts:
            rows = np.arange(start, start + size) % n  # the last part is padded to the batch size
            part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
            index = (first + start + np.arange(size)).astype(np.int32)
            part, index = sharding.put_global(self.mesh, (part, index))
            parts.append(self.program(params, self.frozen, part, index, scales, program=program))
        return np.concatenate([np.asarray(images) for images in parts])[:n]
