"""Training loss: both forms of noising (Eqs. 5 and 6) and both forms of the loss agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.diffusion.loss import add_noise, denoising_loss, draw_timesteps
from condiff_jax.diffusion.schedule import Schedule, scaled_linear

SCHEDULE = scaled_linear()
T = np.array([0, 1, 250, 700, 999])
SHAPE = (5, 4, 6, 3)
X0 = np.asarray(jax.random.normal(jax.random.key(0), SHAPE))
EPS = np.asarray(jax.random.normal(jax.random.key(1), SHAPE))
SIGMA = SCHEDULE.sigma[T].reshape(5, 1, 1, 1)


def eq5():
    """Return x_t in float64 in the EDM form."""
    return (X0 + SIGMA * EPS.astype(np.float64)) / np.sqrt(1 + SIGMA**2)


def test_add_noise_by_hand():
    # With alpha_bar = 0.64, x_t is 0.8 * 10 + 0.6 * 5.
    schedule = Schedule(np.array([0.9, 0.64]))
    x = add_noise(schedule, jnp.full((1, 1), 10.0), jnp.array([1]), jnp.full((1, 1), 5.0))
    np.testing.assert_allclose(x, [[11.0]], rtol=1e-6)


def test_eq_5_equals_eq_6():
    np.testing.assert_allclose(add_noise(SCHEDULE, X0, T, EPS), eq5(), atol=1e-5)


def test_both_forms_of_the_loss_agree():
    outputs = []

    def denoise(x, t, cond):
        outputs.append(np.tanh(0.7 * x + cond[:, None, None, None]))
        return outputs[-1]

    loss = denoising_loss(denoise, SCHEDULE, X0, T, EPS, np.linspace(0, 1, 5))
    x0_hat = np.sqrt(1 + SIGMA**2) * eq5() - SIGMA * np.asarray(outputs[0], np.float64)
    weighted = (np.abs(X0 - x0_hat) ** 2 / SIGMA**2).mean((1, 2, 3))
    assert loss.shape == (5,)
    np.testing.assert_allclose(loss, weighted, rtol=1e-5)


def test_a_perfect_denoiser_has_zero_loss():
    def denoise(x, t, cond):
        root = np.sqrt(SCHEDULE.alpha_bar[t]).reshape(-1, 1, 1, 1)
        return (x - root * X0) / np.sqrt(1 - root**2)

    # The f32 rounding error of x_t, 1e-7, is divided by sqrt(1 - alpha_bar) >= 0.029.
    loss = denoising_loss(denoise, SCHEDULE, X0, T, EPS, None)
    np.testing.assert_allclose(loss, 0, atol=1e-9)


def test_loss_is_the_mean_over_each_sample_by_hand():
    eps = jnp.stack([jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.zeros((2, 2))])
    loss = denoising_loss(lambda x, t, c: 0 * x, SCHEDULE, 0 * eps, jnp.array([3, 4]), eps, None)
    np.testing.assert_allclose(loss, [7.5, 0])


def test_denoiser_gets_the_timesteps_and_the_condition():
    calls = []
    cond = object()
    denoising_loss(lambda *args: calls.append(args) or args[0], SCHEDULE, X0, T, EPS, cond)
    np.testing.assert_array_equal(calls[0][1], T)
    assert calls[0][2] is cond


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_is_computed_in_f32(dtype):
    ones = jnp.ones((1, 999))
    denoise = lambda x, t, c: (ones * 3).astype(dtype)  # noqa: E731
    loss = denoising_loss(denoise, SCHEDULE, ones, jnp.array([0]), ones * 0.001, None)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [2.999**2], rtol=1e-5)


def test_every_example_of_a_batch_gets_every_timestep_equally_often():
    """Each position is uniform, and a batch has one timestep in each of its equal parts."""
    keys = jax.random.split(jax.random.key(0), 8000)
    batch, parts = 4, 8
    t = np.asarray(jax.vmap(lambda key: draw_timesteps(key, batch, 1000))(keys))
    assert t.shape == (8000, batch) and t.dtype == np.int32 and t.min() == 0 and t.max() == 999
    for i in range(batch):
        counts = np.bincount(t[:, i] * parts // 1000, minlength=parts)
        assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    assert (np.sort(t * batch // 1000) == np.arange(batch)).all()
