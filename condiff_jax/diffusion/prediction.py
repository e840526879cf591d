"""Prediction types of the network: epsilon (the paper) or v (arXiv:2202.00512, Sec. 4).

v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 is epsilon at low noise and -x_0 at high noise.
All other code uses a denoiser that returns epsilon. The paper predicts epsilon, which at high noise
is nearly the input: to determine x_0, the network must reproduce its input to a relative precision
of 1 / sigma. The loss weights the error of x_0 by 1 / sigma^2, so that a short training with
epsilon learns little about the layout of images, which is decided at high noise.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from condiff_jax.diffusion.schedule import Schedule

PREDICTIONS = ("epsilon", "v")


def predict_epsilon(network: Callable, schedule: Schedule, prediction: str) -> Callable:
    """Make a denoiser(x_t, t, cond) -> eps of a network(x_t, t, cond) -> epsilon or v.

    With v: eps = sqrt(1 - alpha_bar) x_t + sqrt(alpha_bar) v, f32. ValueError for an unknown
    prediction.
    """
    _check(prediction)
    if prediction == "epsilon":
        return network

    def denoise(x: jax.Array, t: jax.Array, cond) -> jax.Array:
        alpha_bar = schedule.alpha_bar_at(t, x.ndim)
        return jnp.sqrt(1 - alpha_bar) * x + jnp.sqrt(alpha_bar) * network(x, t, cond)

    return denoise


def loss_weight(schedule: Schedule, t: jax.Array, prediction: str) -> jax.Array:
    """Weight (B,) by which |eps - eps_hat|^2 becomes the squared error of the prediction.

    1 for epsilon; 1 / alpha_bar = 1 + sigma^2 for v, since eps - eps_hat = sqrt(alpha_bar) (v -
    v_hat). The error of x_0 has the weight 1 / sigma^2 for epsilon and 1 + 1 / sigma^2 for v.
    ValueError for an unknown prediction.
    """
    _check(prediction)
    return jnp.ones(t.shape) if prediction == "epsilon" else 1 / schedule.alpha_bar_at(t)


def _check(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}, choose from {', '.join(PREDICTIONS)}")
