"""Disentangled control conditioning (Eq. 1): c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l).

High-level augmentations phi_h (crop, flip, aspect ratio) shape the composition and act at every
noise level. Low-level ones phi_l (original size, color) shape details, and their weight gamma_c
grows as the noise gets less. `SCALARS` and `WEIGHTINGS` are registries: an entry is all that a new
scalar or weighting needs, see docs/extending.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.conditioning.cond import Control

SINUSOIDS = 256


@dataclasses.dataclass(frozen=True)
class View:
    """How a training image was made from its original.

    image: the result, uint8 (R, R, 3). top, left, rows, columns: the crop, as fractions of the
    original. flip: whether it is mirrored. height, width: of the original, in pixels. brightness,
    contrast, saturation: factors of the color jitter, 1 without.
    """

    image: np.ndarray | None
    top: float
    left: float
    rows: float
    columns: float
    flip: bool
    height: int
    width: int
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclasses.dataclass(frozen=True)
class Scalar:
    """A scalar of control metadata.

    group: what switches it on in `conditioning.control`. level: whether it belongs to phi_h or
    phi_l. value: computes it from a `View`. scale: stretches its range to that of the timesteps,
    because the sinusoids resolve differences of about 1. default: the value to sample with, unless
    `sampling.control` has a field of its name. jitter: only images with a color jitter have it.
    """

    group: str
    level: Literal["high", "low"]
    value: Callable[[View], float]
    scale: float = 1000.0
    default: float = 0.0
    jitter: bool = False


SCALARS = {
    "crop_top": Scalar("crop", "high", lambda view: view.top),
    "crop_left": Scalar("crop", "high", lambda view: view.left),
    "crop_height": Scalar("crop", "high", lambda view: view.rows, default=1.0),
    "crop_width": Scalar("crop", "high", lambda view: view.columns, default=1.0),
    "flip": Scalar("flip", "high", lambda view: view.flip),
    "aspect": Scalar("aspect", "high", lambda view: view.width / view.height, default=1.0),
    "height": Scalar("size", "low", lambda view: view.height, scale=1.0),
    "width": Scalar("size", "low", lambda view: view.width, scale=1.0),
    "brightness": Scalar("color", "low", lambda view: view.brightness, default=1.0, jitter=True),
    "contrast": Scalar("color", "low", lambda view: view.contrast, default=1.0, jitter=True),
    "saturation": Scalar("color", "low", lambda view: view.saturation, default=1.0, jitter=True),
}


def groups() -> tuple[str, ...]:
    """The groups of `SCALARS`: what `conditioning.control` can have."""
    return tuple(dict.fromkeys(scalar.group for scalar in SCALARS.values()))


def scalar_names(jitter: bool) -> tuple[str, ...]:
    """Names of the scalars that images have, with a color jitter or without one."""
    return tuple(name for name, scalar in SCALARS.items() if jitter or not scalar.jitter)


@dataclasses.dataclass(frozen=True)
class ControlSpec:
    """The groups of scalars that a model is conditioned on."""

    groups: tuple[str, ...]

    @property
    def high(self) -> tuple[str, ...]:
        """Names of the scalars in phi_h, in the order of the model's inputs."""
        return self._names("high")

    @property
    def low(self) -> tuple[str, ...]:
        """Names of the scalars in phi_l, in the order of the model's inputs."""
        return self._names("low")

    def _names(self, level: str) -> tuple[str, ...]:
        return tuple(
            name
            for name, scalar in SCALARS.items()
            if scalar.level == level and scalar.group in self.groups
        )

    def control(self, scalars: Mapping[str, Any]) -> Control | None:
        """Pick and scale scalars {name: (B,)} to `Control`; None when no group is on."""
        if not self.groups:
            return None
        batch = jnp.asarray(next(iter(scalars.values()))).shape[0]

        def stack(names):
            columns = [jnp.asarray(scalars[name]) * SCALARS[name].scale for name in names]
            return jnp.stack(columns, -1) if columns else jnp.zeros((batch, 0))

        return Control(high=stack(self.high), low=stack(self.low))


@dataclasses.dataclass(frozen=True)
class Weighting:
    """gamma_c of Eq. 1 as a function of the timestep t; t = 0 is the least noise.

    kind: a key of `WEIGHTINGS`. alpha: power of `cosine`. last: the last timestep of `step`.
    timesteps: T.
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
        """Weights with the shape of t."""
        return WEIGHTINGS[self.kind](self, jnp.asarray(t))


# Each takes (weighting, t). cosine: the "power cosine", with alpha 1, 2, 4 or 8 in Table 2a. step:
# 1[sigma_t <= k] (Table A6). uniform: the SDXL baseline.
WEIGHTINGS = {
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

    The last layer starts at zero (the "zero" initialization of Table 2a): control has no effect at
    initialization.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, scalars: jax.Array) -> jax.Array:
        """Embed scalars (B, S) as (B, D)."""
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
        """Embed control at timesteps t (B,), zero where drop (B,) is true."""
        c_emb = jnp.zeros((t.shape[0], self.width), self.dtype)
        if control.high.shape[-1]:
            c_emb += ScalarEmbed(self.width, self.dtype, name="high")(control.high)
        if control.low.shape[-1]:
            gamma = self.weighting(t)[:, None].astype(self.dtype)
            c_emb += gamma * ScalarEmbed(self.width, self.dtype, name="low")(control.low)
        return jnp.where(drop[:, None], 0, c_emb)
