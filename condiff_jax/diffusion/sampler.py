"""Samplers as one `lax.scan`, with one random key per sample, independent of cond and guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.diffusion.schedule import Schedule

SPACINGS = ("leading", "trailing", "linspace")


def timesteps(total: int, steps: int, spacing: str = "trailing") -> np.ndarray:
    """Decreasing timestep indices (steps,) in 0..total-1 (arXiv:2305.08891, Table 2).

    Each step goes to the next entry, the last one to clean data. This agrees with diffusers'
    DDPMScheduler, and with its DDIMScheduler for `leading` and `trailing` when steps divides total.
    Otherwise DDIMScheduler steps from t to t - total // steps, which is not the start of its next
    step; we deviate from it there. `leading` and `linspace` end at t = 0, so that with a single
    step they treat noise as clean data, as in diffusers.
    """
    if not 1 <= steps <= total:
        raise ValueError(f"sampling.steps must be between 1 and {total}, got {steps}")
    if spacing == "leading":
        return (np.arange(steps) * (total // steps))[::-1].copy()
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / steps)).astype(int)[:steps] - 1
    if spacing == "linspace":
        return np.linspace(0, total - 1, steps).round().astype(int)[::-1].copy()
    raise ValueError(f"unknown spacing {spacing!r}, choose from {', '.join(SPACINGS)}")


def initial_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draw x_T (B, *shape); sample i depends on keys[i] only."""
    return _normal(keys, 0, shape)


def _normal(keys: jax.Array, stream: int | jax.Array, shape: tuple[int, ...]) -> jax.Array:
    draw = partial(jax.random.normal, shape=shape)
    return jax.vmap(lambda key: draw(jax.random.fold_in(key, stream)))(keys)


def ddim(
    denoise: Callable,
    schedule: Schedule,
    x: jax.Array,
    cond,
    keys: jax.Array,
    *,
    steps: int,
    spacing: str = "trailing",
    eta: float = 0.0,
    clip: float | None = None,
    gradient: Callable | None = None,
) -> jax.Array:
    """Sample by DDIM (arXiv:2010.02502, Eq. 12) from x = x_T (B, H, W, C) to x_0.

    keys (B,): the noise of sample i comes from keys[i] and does not depend on the rest of the
    batch. eta: 0 is deterministic, 1 is ancestral. clip: bound on |x_0_hat| (1 for pixel models).
    gradient(x, t, cond), at x = x_t: shifts the mean of each step by its variance times this
    (arXiv:2105.05233, Alg. 1). Deterministic steps, such as all with eta = 0, have no variance.
    """
    t = timesteps(schedule.timesteps, steps, spacing)
    alpha_bar = schedule.alpha_bar[t]
    alpha_bar_next = np.append(alpha_bar[1:], 1.0)
    ratio = alpha_bar / alpha_bar_next
    std = eta * np.sqrt((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - ratio))
    table = np.stack([alpha_bar, alpha_bar_next, std], 1).astype(np.float32)

    def step(x, inputs):
        i, t, (a, a_next, std) = inputs
        model_inputs = (x, jnp.full(x.shape[:1], t), cond)
        eps = denoise(*model_inputs)
        x0 = (x - jnp.sqrt(1 - a) * eps) / jnp.sqrt(a)
        if clip is not None:
            x0 = jnp.clip(x0, -clip, clip)
            eps = (x - jnp.sqrt(a) * x0) / jnp.sqrt(1 - a)
        direction = jnp.sqrt(jnp.maximum(1 - a_next - std**2, 0)) * eps
        x = jnp.sqrt(a_next) * x0 + direction
        if gradient is not None:
            x += std**2 * gradient(*model_inputs)
        if eta:
            x += std * _normal(keys, 1 + i, x.shape[1:])
        return x, None

    inputs = (jnp.arange(steps), jnp.asarray(t, jnp.int32), tuple(jnp.asarray(table).T))
    return jax.lax.scan(step, x, inputs)[0]


def ddpm(*args, eta: float = 1.0, **kwargs) -> jax.Array:
    """Sample by DDPM with the "fixed small" posterior variance: DDIM with eta = 1, eta ignored."""
    del eta
    return ddim(*args, eta=1.0, **kwargs)


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}
