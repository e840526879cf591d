"""Epsilon and v predictions: conversion to a denoiser, and the weight of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from condiff_jax.diffusion.loss import add_noise, denoising_loss
from condiff_jax.diffusion.prediction import PREDICTIONS, loss_weight, predict_epsilon
from condiff_jax.diffusion.schedule import Schedule, scaled_linear

SCHEDULE = scaled_linear()
T = jnp.array([0, 1, 250, 700, 999])
X0 = jax.random.normal(jax.random.key(0), (5, 4, 6, 3))
EPS = jax.random.normal(jax.random.key(1), X0.shape)
ROOT = np.sqrt(SCHEDULE.alpha_bar[T]).reshape(5, 1, 1, 1)  # sqrt(alpha_bar)
V = ROOT * np.asarray(EPS, np.float64) - np.sqrt(1 - ROOT**2) * np.asarray(X0, np.float64)


def test_epsilon_from_v_by_hand():
    # With alpha_bar = 0.64, epsilon is 0.6 * 5 + 0.8 * 10.
    denoise = predict_epsilon(lambda x, t, c: 2 * x, Schedule(np.array([0.9, 0.64])), "v")
    np.testing.assert_allclose(denoise(jnp.full((1, 1), 5.0), jnp.array([1]), None), [[11.0]])


def test_the_true_v_gives_the_true_epsilon():
    denoise = predict_epsilon(lambda *_: V.astype(np.float32), SCHEDULE, "v")
    np.testing.assert_allclose(denoise(add_noise(SCHEDULE, X0, T, EPS), T, None), EPS, atol=1e-5)


def test_v_agrees_with_diffusers():
    scheduler = DDIMScheduler(
        1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    args = (torch.tensor(np.asarray(a)) for a in (X0, EPS, T.astype(jnp.int64)))
    v = scheduler.get_velocity(*args).numpy()
    np.testing.assert_allclose(v, V, atol=1e-5)


def test_epsilon_networks_are_returned_unchanged():
    def network(*args):
        raise AssertionError

    assert predict_epsilon(network, SCHEDULE, "epsilon") is network
    np.testing.assert_array_equal(loss_weight(SCHEDULE, T, "epsilon"), np.ones(5))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_weighted_loss_is_the_squared_error_of_the_prediction(prediction):
    guess = jnp.sin(3 * X0)
    target = V if prediction == "v" else EPS
    denoise = predict_epsilon(lambda *_: guess, SCHEDULE, prediction)
    loss = denoising_loss(denoise, SCHEDULE, X0, T, EPS, None)
    loss = loss * loss_weight(SCHEDULE, T, prediction)
    np.testing.assert_allclose(loss, np.square(target - guess).mean((1, 2, 3)), rtol=1e-4)


def test_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction 'x0', choose from epsilon, v"):
        predict_epsilon(lambda *_: 0, SCHEDULE, "x0")
    with pytest.raises(ValueError, match="unknown prediction 'x0'"):
        loss_weight(SCHEDULE, T, "x0")
