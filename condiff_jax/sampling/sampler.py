"""Sampling, compiled once and run in batches on a mesh."""

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
    """What a compiled sampler is made for; guidance scales are arguments of it."""

    sampler: str
    steps: int
    spacing: str
    eta: float
    clip: bool
    seed: int
    needed: tuple[bool, bool, bool]  # see `dual_guidance`
    classifier: nn.Module | None = None  # that guides besides

    @classmethod
    def create(
        cls, settings: Sampling, resolution: int, network: nn.Module | None = None
    ) -> tuple[SamplingProgram, np.ndarray]:
        """Of these settings, and their guidance scales (3,): lambda by Eq. 4, beta of Eq. 2, and
        the weight of the classifier `network`, if there is one.
        """
        scales = guidance_scale(settings, resolution), settings.control_guidance
        fields = (getattr(settings, name) for name in cls._fields[:-2])
        program = cls(*fields, needed_branches(*scales), network)
        return program, np.array([*scales, settings.classifier_guidance], np.float32)


def noise_keys(seed: int, index: jax.Array) -> jax.Array:
    """Keys (B, 2) of the samples with these numbers: of text padding, and of the sampler."""
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
    """Pictures uint8 (B, R, R, 3) for the requests in `batch`; pure, to be jitted.

    params, frozen: see `System.init` and `Objective.load_frozen`; frozen also has the parameters of
    program.classifier, "classifier". index (B,) int32: the number of each
    sample; its noise comes from (program.seed, index). scales: see `Program.create`.
    """
    params = {**params, **frozen}
    keys = noise_keys(program.seed, index)
    text_noise = None
    if objective.text_encoder is not None:
        shape = (objective.config.text_encoder.length, objective.config.text_encoder.width)
        text_noise = jax.vmap(partial(jax.random.normal, shape=shape))(keys[:, 0])
    cond = objective.condition(params, batch, text_noise)
    denoise, shift = dual_guidance(objective.denoise(params), *scales[:2], program.needed), {}
    if program.classifier is not None:
        log_prob = classifier_guide.log_prob(program.classifier, params["classifier"])
        if program.sampler == "ddpm":
            shift = {"gradient": classifier_gradient(log_prob, scales[2])}
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
        **shift,
    )
    return objective.autoencoder.decode(params.get("autoencoder"), x)


class Sampler:
    """`generate` for batches of one size spread over a mesh, compiled once a `Program`.

    The classifier that settings name is loaded; ConfigError unless it fits the objective.
    """

    def __init__(
        self,
        objective: DiffusionObjective,
        mesh: Mesh,
        settings: Sampling,
        frozen: dict | None = None,
    ):
        self.objective, self.mesh, self.settings, self.frozen = (
            objective,
            mesh,
            settings,
            frozen or {},
        )
        self._load_classifier()
        self.program = jax.jit(
            sharding.traced_on(mesh, partial(generate, objective=objective)),
            static_argnames="program",
            out_shardings=sharding.replicated(mesh),
        )

    def at(self, config: Config) -> Sampler:
        """The same model sampled as another config's `sampling` says; what is compiled is kept."""
        other = copy.copy(self)
        other.objective = dataclasses.replace(self.objective, config=config)
        other.settings = config.sampling
        if other.settings.classifier != self.settings.classifier:
            other._load_classifier()
        return other

    def _load_classifier(self) -> None:
        self.frozen = {name: part for name, part in self.frozen.items() if name != "classifier"}
        self.classifier = None
        if self.settings.classifier:
            self.classifier, params = classifier_guide.load(
                self.objective, self.mesh, self.settings
            )
            self.frozen["classifier"] = params

    def __call__(self, params: dict, batch: dict, *, first: int = 0, label: str = "") -> np.ndarray:
        """Pictures uint8 (N, R, R, 3) for N requests, numbered from `first`."""
        n = len(batch["label"])
        devices = self.mesh.size
        size = -(-min(self.settings.batch_size, n) // devices) * devices
        out = []
        resolution = self.objective.config.data.resolution
        program, scales = SamplingProgram.create(self.settings, resolution, self.classifier)
        starts = tqdm(range(0, n, size), desc=label or "sampling", disable=n <= size, leave=False)
        for start in starts:
            rows = np.arange(start, start + size) % n  # the last part is filled up
            part = jax.tree.map(lambda a, rows=rows: a[rows], batch)
            index = (first + start + np.arange(size)).astype(np.int32)
            part, index = sharding.put_global(self.mesh, (part, index))
            out.append(self.program(params, self.frozen, part, index, scales, program=program))
        return np.concatenate([np.asarray(pictures) for pictures in out])[:n]
