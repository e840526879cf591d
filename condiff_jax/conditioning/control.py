"""Disentangled control conditioning (Eq. 1): c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l).

High-level augmentations phi_h (crop, flip, aspect ratio) shape the composition and act at every
noise level; low-level ones phi_l (original size) shape details and fade in as the noise fades out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.conditioning.cond import Control

# Each group of scalars is switched by one config field; data/augment.py produces all of them.
HIGH_GROUPS = {
    "crop": ("crop_top", "crop_left", "crop_height", "crop_width"),
    "flip": ("flip",),
    "aspect": ("aspect",),
}
LOW_GROUPS = {"size": ("height", "width")}
GROUPS = (*HIGH_GROUPS, *LOW_GROUPS)
# Sinusoids resolve differences of about one: pixels are used as they are, fractions, flags and
# ratios are stretched to the range of the timesteps.
SCALE = {"height": 1.0, "width": 1.0}
DEFAULT_SCALE = 1000.0
SINUSOIDS = 256


@dataclasses.dataclass(frozen=True)
class ControlSpec:
    """Which groups of scalars a model is conditioned on, in the order of its inputs."""

    groups: tuple[str, ...] = GROUPS

    @property
    def high(self) -> tuple[str, ...]:
        """Names of the scalars in phi_h."""
        return tuple(n for g, names in HIGH_GROUPS.items() if g in self.groups for n in names)

    @property
    def low(self) -> tuple[str, ...]:
        """Names of the scalars in phi_l."""
        return tuple(n for g, names in LOW_GROUPS.items() if g in self.groups for n in names)

    def control(self, scalars: Mapping[str, Any]) -> Control | None:
        """Pick and scale scalars {name: (B,)} to `Control`; None when no group is on."""
        if not self.groups:
            return None
        batch = jnp.asarray(next(iter(scalars.values()))).shape[0]

        def stack(names):
            columns = [jnp.asarray(scalars[n]) * SCALE.get(n, DEFAULT_SCALE) for n in names]
            return jnp.stack(columns, -1) if columns else jnp.zeros((batch, 0))

        return Control(high=stack(self.high), low=stack(self.low))


@dataclasses.dataclass(frozen=True)
class Weighting:
    """gamma_c of Eq. 1 as a function of the timestep; u = t / T is 0 for clean images, 1 for noise.

    kind: `cosine` cos(pi u / 2)^alpha ("power cosine", alpha 1, 2, 4, 8 in Table 2a), `linear`
    1 - u, `step` 1[sigma_t <= k] (Table A6) given as 1[t <= last], `uniform` 1 (the SDXL
    baseline), `zero` 0.
    """

    kind: str = "cosine"
    alpha: float = 8.0
    last: int = 0
    timesteps: int = 1000

    @classmethod
    def create(cls, kind: str, *, alpha: float, k: float, sigma: np.ndarray) -> Weighting:
        """Weighting for a schedule with noise levels sigma (T,), increasing; k bounds `step`."""
        last = int(np.searchsorted(sigma, k, side="right")) - 1
        return cls(kind, alpha, last, len(sigma))

    def __call__(self, t: jax.Array) -> jax.Array:
        """Weights in [0, 1] with the shape of t."""
        return KINDS[self.kind](self, jnp.asarray(t))


KINDS = {
    "cosine": lambda w, t: jnp.cos(math.pi / 2 * t / w.timesteps) ** w.alpha,
    "linear": lambda w, t: 1.0 - t / w.timesteps,
    "step": lambda w, t: (t <= w.last).astype(jnp.float32),
    "uniform": lambda w, t: jnp.ones(t.shape),
    "zero": lambda w, t: jnp.zeros(t.shape),
}


def sinusoid(
    x: jax.Array, dim: int, max_period: float = 10000.0, *, last: bool = False
) -> jax.Array:
    """Sinusoidal features of x (...) as (..., dim): cosines, then sines; periods to max_period.

    last: the longest of them is max_period itself, as in DDPM, and not the next one.
    """
    half = dim // 2
    frequencies = jnp.exp(-math.log(max_period) / (half - last) * jnp.arange(half))
    angles = jnp.asarray(x, jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


class ScalarEmbed(nn.Module):
    """E_h or E_l: sinusoids of each scalar, concatenated, then Linear-SiLU-Linear to `width`.

    The last layer starts at zero (the "zero" initialisation of Table 2a): control begins unheard.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, scalars: jax.Array) -> jax.Array:  # (B, S) -> (B, D)
        x = sinusoid(scalars, SINUSOIDS).reshape(scalars.shape[0], -1)  # (B, S * 256)
        x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(x)
        x = nn.silu(x)
        zeros = nn.initializers.zeros
        return nn.Dense(self.width, kernel_init=zeros, dtype=self.dtype, name="fc2")(x)


class ControlEmbed(nn.Module):
    """c_emb of Eq. 1 (B, width); zero where control is dropped (the null control of Eq. 2)."""

    width: int
    weighting: Weighting
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, control: Control, t: jax.Array, drop: jax.Array) -> jax.Array:
        c_emb = jnp.zeros((t.shape[0], self.width), self.dtype)
        if control.high.shape[-1]:
            c_emb += ScalarEmbed(self.width, self.dtype, name="high")(control.high)
        if control.low.shape[-1]:
            gamma = self.weighting(t)[:, None].astype(self.dtype)
            c_emb += gamma * ScalarEmbed(self.width, self.dtype, name="low")(control.low)
        return jnp.where(drop[:, None], 0, c_emb)
