"""Guidance as wrappers: each takes denoise(x, t, cond) -> eps and returns another one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

Denoise = Callable[..., jax.Array]


def dual_guidance(denoise: Denoise, scale: float = 1.0, control_scale: float = 1.0) -> Denoise:
    """Eq. 2 with lambda = scale and beta = control_scale.

    eps = lambda [beta eps(c,s) + (1 - beta) eps(0,s)] + (1 - lambda) eps(0,0). Branches whose
    weight is zero are not computed: 3 in general, 2 when beta = 1 (plain classifier-free
    guidance) or lambda = 1, and 1 when both are 1. The rest is one batched call.
    """
    branches = [
        # weight, drop semantics, drop control
        (scale * control_scale, False, False),
        (scale * (1 - control_scale), False, True),
        (1 - scale, True, True),
    ]
    branches = [branch for branch in branches if branch[0] != 0.0]
    n = len(branches)
    weights = jnp.asarray([w for w, _, _ in branches], jnp.float32)
    drop_semantics = jnp.asarray([s for _, s, _ in branches])
    drop_control = jnp.asarray([c for _, _, c in branches])

    def guided(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        batch = x.shape[0]
        # The copies of one image stay neighbours, hence on one device when the batch is sharded.
        x, t, cond = jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), (x, t, cond))
        cond = cond.drop(
            semantics=jnp.tile(drop_semantics, batch), control=jnp.tile(drop_control, batch)
        )
        eps = denoise(x, t, cond).astype(jnp.float32)
        return jnp.einsum("bn...,n->b...", eps.reshape(batch, n, *eps.shape[1:]), weights)

    return guided


def classifier_free_guidance(denoise: Denoise, scale: float) -> Denoise:
    """eps = lambda eps(c,s) + (1 - lambda) eps(0,0) [Ho & Salimans]: Eq. 2 with beta = 1."""
    return dual_guidance(denoise, scale, 1.0)


def scaled_guidance(scale: float, upsampling: float) -> float:
    """Eq. 4: the optimal scale after upsampling by s is lambda' = 1 + s (lambda - 1)."""
    return 1 + upsampling * (scale - 1)
