"""Optimizers and learning-rate schedules, from optax."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from condiff_jax.config.schema import Config


def learning_rate(config: Config) -> optax.Schedule:
    """Create the schedule: a linear warm-up over updates from 0, then `optimizer.schedule`.

    constant. cosine: to zero at the last step. rsqrt: proportional to 1 / sqrt(count) after
    `decay_after` updates (EDM2, arXiv:2312.02696, Eq. 67), so that a run can be extended.
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
    # Update i of the warm-up has the rate peak (i + 1) / warmup: the first is not zero.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, body], [warmup])


def create(config: Config) -> optax.GradientTransformation:
    """Create Adam (Sec. 3.1) or AdamW, with clipping of the global gradient norm if configured."""
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
