"""Noise schedules: parity with diffusers, and rescaling between resolutions (Eq. 3)."""

import numpy as np
import pytest
from diffusers import DDPMScheduler

from condiff_jax.diffusion.schedule import (
    SCHEDULES,
    Schedule,
    cosine,
    linear,
    rescale,
    scaled_linear,
)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012},
        {"timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02},
    ],
)
def test_scaled_linear_agrees_with_diffusers(settings):
    defaults = {"timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}
    values = defaults | settings
    values["num_train_timesteps"] = values.pop("timesteps")
    expected = DDPMScheduler(beta_schedule="scaled_linear", **values).alphas_cumprod.numpy()
    schedule = scaled_linear(**settings)
    assert schedule.timesteps == len(expected)
    # diffusers multiplies up to a thousand factors in f32.
    np.testing.assert_allclose(schedule.alpha_bar, expected, rtol=1e-4)


@pytest.mark.parametrize("timesteps", [100, 1000])
def test_linear_and_cosine_agree_with_diffusers(timesteps):
    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    for schedule, name in ((linear(timesteps), "linear"), (cosine(timesteps), "squaredcos_cap_v2")):
        expected = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule=name, **betas)
        np.testing.assert_allclose(schedule.alpha_bar, expected.alphas_cumprod.numpy(), rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_always_grows(name):
    schedule = SCHEDULES[name](1000, 0.00085, 0.012)
    assert schedule.timesteps == 1000
    assert schedule.alpha_bar.min() > 0 and schedule.alpha_bar.max() < 1
    assert (np.diff(schedule.alpha_bar) < 0).all()


def test_scaled_linear_by_hand():
    # The square roots of beta are 0.1, 0.2 and 0.3.
    schedule = scaled_linear(3, 0.01, 0.09)
    np.testing.assert_allclose(schedule.alpha_bar, [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91])
    assert schedule.alpha_bar.dtype == np.float64


def test_sigma_by_hand():
    np.testing.assert_allclose(Schedule(np.array([0.8, 0.5, 0.1])).sigma, [0.5, 1, 3])


def test_alpha_bar_at_timesteps():
    picked = Schedule(np.array([0.8, 0.5, 0.1])).alpha_bar_at(np.array([2, 0]), 3)
    np.testing.assert_allclose(picked, [[[0.1]], [[0.8]]], rtol=1e-6)
    assert picked.dtype == np.float32


def test_rescale_by_hand():
    # sigma doubles with the side: 1 and 2 become 2 and 4.
    schedule = rescale(Schedule(np.array([0.5, 0.2])), 128, 256)
    np.testing.assert_allclose(schedule.alpha_bar, [0.2, 1 / 17])


@pytest.mark.parametrize("s, s_new", [(256, 512), (512, 256), (32, 48), (64, 64)])
def test_rescale_scales_sigma(s, s_new):
    schedule = scaled_linear()
    scaled = rescale(schedule, s, s_new)
    np.testing.assert_allclose(scaled.sigma, schedule.sigma * s_new / s, rtol=1e-10)
    assert scaled.timesteps == 1000
    assert ((scaled.alpha_bar > 0) & (scaled.alpha_bar < 1)).all()


def test_rescale_to_the_same_resolution_is_the_identity():
    np.testing.assert_allclose(
        rescale(scaled_linear(), 256, 256).alpha_bar, scaled_linear().alpha_bar, rtol=1e-14
    )


def test_rescale_composes():
    direct = rescale(scaled_linear(), 1, 4)
    composed = rescale(rescale(scaled_linear(), 1, 2), 2, 4)
    np.testing.assert_allclose(composed.alpha_bar, direct.alpha_bar, rtol=1e-10)
