"""Samplers: parity with diffusers, and with the exact solution for Gaussian data."""

from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from condiff_jax.diffusion.sampler import SAMPLERS, SPACINGS, ddim, ddpm, initial_noise, timesteps
from condiff_jax.diffusion.schedule import scaled_linear

SCHEDULE = scaled_linear()
SHAPE = (2, 2, 3)
KEYS = jax.random.split(jax.random.key(0), 5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 3, 7, 25, 50, 150, 999, 1000])
def test_timesteps_agree_with_diffusers(spacing, steps):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    times = timesteps(1000, steps, spacing)
    assert times.shape == (steps,)
    # Rounding in arange can give diffusers one entry too many.
    np.testing.assert_array_equal(times, scheduler.timesteps.numpy()[:steps])
    assert (np.diff(times) < 0).all() and times[0] < 1000 and times[-1] >= 0


def test_timesteps_by_hand():
    np.testing.assert_array_equal(timesteps(10, 5, "leading"), [8, 6, 4, 2, 0])
    np.testing.assert_array_equal(timesteps(10, 5), [9, 7, 5, 3, 1])
    np.testing.assert_array_equal(timesteps(10, 4, "linspace"), [9, 6, 3, 0])


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_bad_steps(steps):
    with pytest.raises(ValueError, match=f"steps must be between 1 and 1000, got {steps}"):
        timesteps(1000, steps)


def test_bad_spacing():
    with pytest.raises(ValueError, match="unknown spacing 'karras', choose from leading"):
        timesteps(1000, 10, "karras")


def fake(x, t, tanh):
    """Nonlinear function of x and t, for JAX or PyTorch arrays."""
    return 1.2 * tanh(1.3 * x + 0.001 * t - 0.4) + 0.1 * x


def run(sampler, x, keys=KEYS[:2], **kwargs):
    """Run a sampler step by step; returns (x at every step and x_0, t at every step)."""
    states, times = [], []

    def denoise(x, t, cond):
        assert cond == "condition"
        states.append(np.asarray(x))
        times.append(np.asarray(t))
        return fake(x, t[:, None, None, None], jnp.tanh)

    with jax.disable_jit():
        x = sampler(denoise, SCHEDULE, x, "condition", keys, **kwargs)
    return np.stack([*states, x]), np.stack(times)


def step_noise(i, keys=KEYS[:2]):
    """Return the noise of step i, stream 1 + i of each key; stream 0 is x_T."""
    return torch.stack(
        [torch.tensor(jax.random.normal(jax.random.fold_in(k, 1 + i), SHAPE).copy()) for k in keys]
    )


def diffusers_run(scheduler, x, times, **kwargs):
    """Run a diffusers scheduler in float64 with our alpha_bar; returns all states."""
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alpha_bar)
    x = torch.tensor(np.asarray(x), dtype=torch.float64)
    states = [x]
    for i, t in enumerate(times):
        step = partial(scheduler.step, fake(x, int(t), torch.tanh), int(t), x, **kwargs)
        if isinstance(scheduler, DDIMScheduler):
            x = step(variance_noise=step_noise(i)).prev_sample
        else:
            name = "diffusers.schedulers.scheduling_ddpm.randn_tensor"
            with mock.patch(name, lambda *args, i=i, **kwargs: step_noise(i)):
                x = step().prev_sample
        states.append(x)
    return torch.stack(states).numpy()


X_T = initial_noise(KEYS[:2], SHAPE)


def test_initial_noise_is_stream_0_of_each_key():
    expected = [jax.random.normal(jax.random.fold_in(key, 0), SHAPE) for key in KEYS[:2]]
    np.testing.assert_array_equal(X_T, expected)


@pytest.mark.parametrize("eta, clip", [(0.0, None), (1.0, None), (0.0, 1.0), (0.6, 0.3)])
@pytest.mark.parametrize(
    "spacing, steps", [("leading", 8), ("trailing", 8), ("linspace", 10), ("trailing", 1)]
)
def test_ddim_agrees_with_diffusers(spacing, steps, eta, clip):
    scheduler = DDIMScheduler(
        timestep_spacing=spacing, clip_sample=clip is not None, clip_sample_range=clip or 1.0
    )
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.numpy()
    if spacing == "linspace":
        # diffusers always steps by 1000 // num_inference_steps, see `timesteps`; the gap is 111.
        scheduler.num_inference_steps = steps - 1
        assert (np.diff(times) == -(1000 // (steps - 1))).all()
    expected = diffusers_run(
        scheduler, X_T, times, eta=eta, use_clipped_model_output=clip is not None
    )
    states, actual_times = run(ddim, X_T, steps=steps, spacing=spacing, eta=eta, clip=clip)
    np.testing.assert_array_equal(actual_times, np.stack([times, times], 1))
    np.testing.assert_allclose(states, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [7, 10])  # 7 does not divide 1000
def test_ddpm_agrees_with_diffusers(spacing, steps, clip):
    scheduler = DDPMScheduler(
        timestep_spacing=spacing, variance_type="fixed_small",
        clip_sample=clip is not None, clip_sample_range=clip or 1.0,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    times = timesteps(1000, steps, spacing)
    expected = diffusers_run(scheduler, X_T, times)
    # ddpm ignores eta.
    states, _ = run(ddpm, X_T, steps=steps, spacing=spacing, clip=clip, eta=0.0)
    np.testing.assert_allclose(states, expected, atol=2e-5 * np.abs(expected).max())


def gaussian(mu, s):
    """Return the exact denoiser E[eps | x_t] of data N(mu, s^2)."""
    alpha_bar = jnp.asarray(SCHEDULE.alpha_bar, jnp.float32)

    def denoise(x, t, cond):
        a = alpha_bar[t].reshape(-1, 1, 1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * mu) / (a * s**2 + 1 - a)

    return denoise


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps, spacing", [(1, "trailing"), (3, "leading"), (20, "linspace")])
def test_a_point_mass_is_recovered_in_any_number_of_steps(sampler, steps, spacing):
    mu = jnp.array([1.0, -2.0, 0.5])
    denoise = gaussian(mu, 0.0)
    out = SAMPLERS[sampler](denoise, SCHEDULE, X_T, None, KEYS[:2], steps=steps, spacing=spacing)
    np.testing.assert_allclose(out, np.broadcast_to(mu, out.shape), atol=1e-4)


def test_ddim_converges_to_the_probability_flow():
    mu, s = 0.7, 0.5
    a = SCHEDULE.alpha_bar[-1]
    x = jnp.linspace(-2, 2, 9).reshape(9, 1, 1, 1)
    exact = mu + s * (x - np.sqrt(a) * mu) / np.sqrt(a * s**2 + 1 - a)
    keys = jax.random.split(jax.random.key(0), 9)
    errors = []
    for steps in (50, 100, 200):
        out = ddim(gaussian(mu, s), SCHEDULE, x, None, keys, steps=steps)
        errors.append(np.abs(out - exact).max())
    assert errors[2] < 0.02
    ratios = np.array(errors[:-1]) / errors[1:]  # the error of a first-order solver halves
    assert ((ratios > 1.8) & (ratios < 2.2)).all(), errors


def test_ddpm_samples_have_the_statistics_of_the_data():
    mu, s, n = 0.7, 0.5, 10_000
    keys = jax.random.split(jax.random.key(3), n)
    sample = jax.jit(partial(ddpm, gaussian(mu, s), SCHEDULE, steps=500))
    out = np.asarray(sample(initial_noise(keys, (1, 1, 1)), None, keys))
    assert out.shape == (n, 1, 1, 1)
    # Three standard errors are 0.015 and 0.011. The "fixed small" variance is too small by O(1 /
    # steps), here by 0.006 in the standard deviation.
    assert abs(out.mean() - mu) < 0.015
    assert -0.017 < out.std() - s < 0.011


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_depend_on_their_own_key_alone(sampler):
    denoise = lambda x, t, cond: fake(x, t[:, None, None, None], jnp.tanh)  # noqa: E731

    @jax.jit
    def sample(keys):
        x = initial_noise(keys, SHAPE)
        return SAMPLERS[sampler](denoise, SCHEDULE, x, None, keys, steps=5, eta=0.7)

    together = np.asarray(sample(KEYS))
    np.testing.assert_allclose(sample(KEYS[3:4]), together[3:4], atol=1e-5)
    np.testing.assert_allclose(sample(KEYS[::-1]), together[::-1], atol=1e-5)
    assert np.abs(together[1:] - together[:-1]).max((1, 2, 3)).min() > 0.1
