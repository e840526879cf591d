"""Guidance as wrappers: each takes a denoiser denoise(x, t, cond) -> eps and returns another."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from condiff_jax.diffusion.schedule import Schedule

Denoise = Callable[..., jax.Array]


def needed_branches(scale: float, control_scale: float) -> tuple[bool, bool, bool]:
    """Whether each of eps(c,s), eps(0,s) and eps(0,0) in Eq. 2 has a nonzero weight."""
    return tuple(weight != 0 for weight in _weights(scale, control_scale))


def _weights(scale, control_scale) -> tuple:
    return scale * control_scale, scale * (1 - control_scale), 1 - scale


def dual_guidance(
    denoise: Denoise,
    scale: float | jax.Array = 1.0,
    control_scale: float | jax.Array = 1.0,
    needed: tuple[bool, bool, bool] | None = None,
) -> Denoise:
    """Guide by semantics and control: Eq. 2 with lambda = scale and beta = control_scale.

    eps = lambda [beta eps(c,s) + (1 - beta) eps(0,s)] + (1 - lambda) eps(0,0). Branches with zero
    weight are not computed, which leaves 3 in general, 2 when beta = 1 (plain classifier-free
    guidance) or lambda = 1, and 1 when both are 1. They are computed in one batched call.

    needed: the result of `needed_branches`, required when the scales are traced.
    """
    needed = needed or needed_branches(scale, control_scale)
    flags = ((False, False), (False, True), (True, True))  # drop semantics, drop control
    all_weights = _weights(scale, control_scale)
    branches = [
        (weight, *drops)
        for weight, drops, is_needed in zip(all_weights, flags, needed, strict=True)
        if is_needed
    ]
    n = len(branches)
    weights = jnp.stack([jnp.asarray(w, jnp.float32) for w, _, _ in branches])
    drop_semantics = jnp.asarray([s for _, s, _ in branches])
    drop_control = jnp.asarray([c for _, _, c in branches])

    def guided(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        batch = x.shape[0]
        # The copies of an image stay adjacent, hence on one device when the batch is sharded.
        x, t, cond = jax.tree.map(lambda a: jnp.repeat(a, n, axis=0), (x, t, cond))
        cond = cond.drop(
            semantics=jnp.tile(drop_semantics, batch), control=jnp.tile(drop_control, batch)
        )
        eps = denoise(x, t, cond).astype(jnp.float32)
        return jnp.einsum("bn...,n->b...", eps.reshape(batch, n, *eps.shape[1:]), weights)

    return guided


def classifier_free_guidance(denoise: Denoise, scale: float) -> Denoise:
    """Guide by classifier-free guidance (Ho & Salimans), which is Eq. 2 with beta = 1.

    eps = lambda eps(c,s) + (1 - lambda) eps(0,0).
    """
    return dual_guidance(denoise, scale, 1.0)


def implicit_classifier_guidance(denoise: Denoise, weight: float) -> Denoise:
    """Classifier-free guidance with lambda = w + 1 (arXiv:2207.12598, Eq. 6), w = weight.

    eps = (w + 1) eps(c,s) - w eps(0,0). It equals `classifier_guidance` of the conditional
    denoiser with weight w and the implicit classifier: the ratio of conditional and unconditional
    model.
    """
    return classifier_free_guidance(denoise, weight + 1)


def classifier_gradient(log_prob: Callable, scale: float | jax.Array) -> Callable:
    """Return gradient(x, t, cond) = scale * d log p(y | x_t, t) / d x_t, f32 of x's shape.

    log_prob(x, t, cond) -> (B,): log p(y | x_t, t) of the class y in cond.
    """

    def gradient(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        return scale * jax.grad(lambda x: log_prob(x, t, cond).sum())(x.astype(jnp.float32))

    return gradient


def classifier_guidance(
    denoise: Denoise, log_prob: Callable, schedule: Schedule, scale: float | jax.Array
) -> Denoise:
    """Guide by a classifier for deterministic samplers (arXiv:2105.05233, Alg. 2), w = scale.

    eps - sqrt(1 - alpha_bar_t) w grad log p(y | x_t, t), the epsilon of p(x_t) p(y | x_t)^w.
    Stochastic samplers take the argument `gradient` instead, see `sampler.ddim`. Around another
    guidance wrapper, the gradient is added once, to the guided epsilon. log_prob: see
    `classifier_gradient`.
    """
    gradient = classifier_gradient(log_prob, scale)

    def guided(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        std = jnp.sqrt(1 - schedule.alpha_bar_at(t, x.ndim))
        return denoise(x, t, cond) - std * gradient(x, t, cond)

    return guided


def scaled_guidance(scale: float, upsampling: float) -> float:
    """Eq. 4: the optimal guidance scale after upsampling by s is lambda' = 1 + s (lambda - 1)."""
    return 1 + upsampling * (scale - 1)
