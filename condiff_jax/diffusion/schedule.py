"""Noise schedules, and their rescaling between resolutions (Eq. 3)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Discrete variance-preserving schedule; alpha_bar (T,) float64, decreasing in (0, 1)."""

    alpha_bar: np.ndarray

    @property
    def timesteps(self) -> int:
        """Number of noise levels T."""
        return len(self.alpha_bar)

    @property
    def sigma(self) -> np.ndarray:
        """EDM noise level sigma_t = sqrt((1 - alpha_bar) / alpha_bar), (T,)."""
        return np.sqrt((1 - self.alpha_bar) / self.alpha_bar)

    def alpha_bar_at(self, t: jax.Array, ndim: int = 1) -> jax.Array:
        """Look up alpha_bar at timesteps t (B,) as f32 (B, 1, ...) with ndim axes."""
        return jnp.asarray(self.alpha_bar, jnp.float32)[t].reshape(-1, *[1] * (ndim - 1))


def scaled_linear(
    timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
) -> Schedule:
    """Create the paper's "quadratic" schedule (App. C): sqrt(beta_t) is linear in t."""
    beta = np.linspace(beta_start**0.5, beta_end**0.5, timesteps) ** 2
    return Schedule(np.cumprod(1 - beta))


def linear(timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """Create DDPM's schedule (arXiv:2006.11239, Sec. 4): beta_t is linear in t."""
    return Schedule(np.cumprod(1 - np.linspace(beta_start, beta_end, timesteps)))


def cosine(timesteps: int = 1000, *_) -> Schedule:
    """Create the cosine schedule (arXiv:2102.09672, Eq. 17), with beta_t at most 0.999.

    It ignores beta_start and beta_end.
    """
    u = np.arange(timesteps + 1) / timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return Schedule(np.cumprod(np.maximum(alpha_bar[1:] / alpha_bar[:-1], 0.001)))


# All functions take (timesteps, beta_start, beta_end).
SCHEDULES = {"scaled_linear": scaled_linear, "linear": linear, "cosine": cosine}


def rescale(schedule: Schedule, s: float, s_new: float) -> Schedule:
    """Rescale a schedule from resolution s to s_new (Eq. 3), with equal uncertainty per patch.

    alpha_bar' = s^2 alpha_bar / (s'^2 + alpha_bar (s^2 - s'^2)), that is sigma' = sigma s' / s.
    """
    a = schedule.alpha_bar
    return Schedule(s**2 * a / (s_new**2 + a * (s**2 - s_new**2)))
