"""What the network's output stands for: the paper's epsilon, or v (arXiv:2202.00512, Sec. 4).

v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 is epsilon at low noise and -x_0 at high noise.
Everything outside sees a denoiser of epsilon, whatever its network predicts. The paper predicts
epsilon, which at high noise is the input itself: to find x_0 the network must reproduce its input
to a relative precision of 1 / sigma, and its loss gives the error of x_0 the weight 1 / sigma^2, so
that little of a short training is about the layout of pictures, which is decided at high noise.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from condiff_jax.diffusion.schedule import Schedule

PREDICTIONS = ("epsilon", "v")


def predict_epsilon(network: Callable, schedule: Schedule, prediction: str) -> Callable:
    """denoise(x_t, t, cond) -> eps, f32 for v, of a network(x_t, t, cond) that predicts either.

    With v: eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v. ValueError if unknown.
    """
    _check(prediction)
    if prediction == "epsilon":
        return network

    def denoise(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        alpha_bar = schedule.alpha_bar_at(t, x.ndim)
        return jnp.sqrt(1 - alpha_bar) * x + jnp.sqrt(alpha_bar) * network(x, t, cond)

    return denoise


def loss_weight(schedule: Schedule, t: jax.Array, prediction: str) -> jax.Array:
    """Weight (B,) of |eps - eps_hat|^2 that makes it the squared error of the prediction.

    1 for epsilon; 1 / alpha_bar = 1 + sigma^2 for v, since eps - eps_hat = sqrt(alpha_bar) (v -
    v_hat): the error of x_0 has the weight 1 / sigma^2 for epsilon and 1 + 1 / sigma^2 for v.
    ValueError if unknown.
    """
    _check(prediction)
    return jnp.ones(t.shape) if prediction == "epsilon" else 1 / schedule.alpha_bar_at(t)


def _check(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}, choose from {', '.join(PREDICTIONS)}")
