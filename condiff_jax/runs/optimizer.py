"""Optimizers and learning-rate schedules, from optax."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from condiff_jax.config.schema import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Learning rate of update `count` (from 0): a linear warm-up, then `optimizer.schedule`.

    constant. cosine: to zero at the last step. rsqrt: with one over the root of the count after
    `decay_after` updates (EDM2, arXiv:2312.02696, Eq. 67), so that a run can go on for longer.
    """
    settings = config.optimizer
    peak, warmup = settings.learning_rate, settings.warmup
    if settings.schedule == "cosine":
        body = optax.cosine_decay_schedule(peak, max(config.steps - warmup, 1))
    elif settings.schedule == "rsqrt":
        start = settings.decay_after
        body = lambda count: peak * jnp.sqrt(start / jnp.maximum(count + warmup, start))  # noqa: E731
    else:
        body = optax.constant_schedule(peak)
    if not warmup:
        return body
    # The first update already moves: step i of the warm-up has rate (i + 1) / warmup.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, body], [warmup])


def create(config: Config) -> optax.GradientTransformation:
    """Adam (Sec. 3.1) or AdamW, behind clipping of the global gradient norm where asked for."""
    settings = config.optimizer
    rate = learning_rate(config)
    common = {"b1": settings.b1, "b2": settings.b2, "eps": settings.eps}
    if settings.name == "adamw":
        tx = optax.adamw(rate, weight_decay=settings.weight_decay, **common)
    else:
        tx = optax.adam(rate, **common)
    if settings.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(settings.clip_norm), tx)
    return tx
