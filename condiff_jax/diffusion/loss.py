"""Training loss: EDM-weighted denoising with epsilon prediction (App. C, Eqs. 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from condiff_jax.diffusion.schedule import Schedule


def draw_timesteps(key: jax.Array, batch: int, timesteps: int) -> jax.Array:
    """Draw t (B,) int32 by low-discrepancy sampling: B equidistant values with a random offset.

    Each t is uniform in 0..T-1, and a batch covers all noise levels, whose losses differ a
    hundredfold (arXiv:2107.00630, I.1).
    """
    u = (jnp.arange(batch) / batch + jax.random.uniform(key)) % 1.0
    return (u * timesteps).astype(jnp.int32)


def add_noise(schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Noise x_0 by Eq. 5, equal to Eq. 6: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps."""
    alpha_bar = schedule.alpha_bar_at(t, x0.ndim)
    return jnp.sqrt(alpha_bar) * x0 + jnp.sqrt(1 - alpha_bar) * eps


def denoising_loss(
    denoise: Callable, schedule: Schedule, x0: jax.Array, t: jax.Array, eps: jax.Array, cond
) -> jax.Array:
    """Denoising loss of each sample, (B,).

    The paper weights |x_0 - x_0_hat|^2 by 1 / sigma_t^2. With x_0_hat = sqrt(1 + sigma^2) x_t -
    sigma eps_hat (Eq. 17) this is |eps - eps_hat|^2, which avoids the numerical cancellation.
    """
    eps_hat = denoise(add_noise(schedule, x0, t, eps), t, cond)
    error = jnp.square(eps_hat.astype(jnp.float32) - eps)
    return error.mean(axis=tuple(range(1, error.ndim)))
