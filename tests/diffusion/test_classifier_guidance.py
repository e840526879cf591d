"""Classifier guidance as a shift of epsilon and of the mean, against closed-form solutions."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.conditioning.cond import Cond
from condiff_jax.diffusion.guidance import (
    classifier_gradient,
    classifier_guidance,
    dual_guidance,
    implicit_classifier_guidance,
)
from condiff_jax.diffusion.sampler import ddim, ddpm, initial_noise
from condiff_jax.diffusion.schedule import scaled_linear

SCHEDULE = scaled_linear()
# The data is a mixture of one Gaussian per class, in one dimension.
MEANS = np.array([-1.5, 0.5, 1.2])
STD = 0.4
PRIORS = np.array([0.5, 0.2, 0.3])
N = 4000  # samples


def log_joint(x, alpha_bar):
    """Return log p_t(x, y) (B, 3) of noised samples x (B, 1, 1, 1)."""
    mean, variance = jnp.sqrt(alpha_bar) * MEANS, alpha_bar * STD**2 + 1 - alpha_bar
    return jnp.log(PRIORS) - (x - mean)[:, 0, 0] ** 2 / (2 * variance[:, 0, 0])


def log_prob(x, t, cond):
    """Return log p(y | x_t) of the class in cond."""
    logs = jax.nn.log_softmax(log_joint(x, SCHEDULE.alpha_bar_at(t, x.ndim)))
    return jnp.take_along_axis(logs, cond.semantics[:, None], 1)[:, 0]


def denoise(x, t, cond):
    """Exact epsilon of the class, or of the whole mixture where semantics are dropped."""
    a = SCHEDULE.alpha_bar_at(t, x.ndim)
    weights = jax.nn.softmax(log_joint(x, a))
    one_hot = jax.nn.one_hot(cond.semantics, 3)
    weights = jnp.where(cond.drop_semantics[:, None], weights, one_hot)[:, None, None]
    mean = (weights * jnp.sqrt(a) * MEANS).sum(-1, keepdims=True)
    return jnp.sqrt(1 - a) * (x - mean) / (a * STD**2 + 1 - a)


UNCONDITIONAL = dual_guidance(denoise, 0.0)
X = jnp.linspace(-3, 3, 12).reshape(12, 1, 1, 1)
T = jnp.array([0, 50, 400, 999] * 3)
COND = Cond.of(jnp.arange(12) % 3)


def test_bayes_rule_gives_the_conditional_denoiser():
    guided = classifier_guidance(UNCONDITIONAL, log_prob, SCHEDULE, 1.0)
    np.testing.assert_allclose(guided(X, T, COND), denoise(X, T, COND), atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.0])
def test_the_gradient_is_added_once_to_the_guided_epsilon(scale, guidance):
    guided = classifier_guidance(dual_guidance(denoise, guidance), log_prob, SCHEDULE, scale)
    eps = np.asarray(dual_guidance(denoise, guidance)(X, T, COND))
    a = SCHEDULE.alpha_bar[T].reshape(-1, 1, 1, 1)
    step = 1e-3  # of a central difference
    slope = [np.asarray(log_prob(X + d, T, COND)) for d in (step, -step)]
    slope = ((slope[0] - slope[1]) / (2 * step)).reshape(eps.shape)
    np.testing.assert_allclose(
        guided(X, T, COND), eps - np.sqrt(1 - a) * scale * slope, atol=2e-2 * max(scale, 0.1)
    )


@partial(jax.jit, static_argnums=0)
def guided_samples(form, scale, label):
    keys = jax.random.split(jax.random.key(1), N)
    x, cond = initial_noise(keys, (1, 1, 1)), Cond.of(jnp.full((N,), label))
    if form == "mean":
        shift = classifier_gradient(log_prob, scale)
        return ddpm(UNCONDITIONAL, SCHEDULE, x, cond, keys, steps=250, gradient=shift)
    guided = classifier_guidance(UNCONDITIONAL, log_prob, SCHEDULE, scale)
    return ddim(guided, SCHEDULE, x, cond, keys, steps=250)


@cache
def sample(form, scale, label):
    """Draw N samples (N,) of the unconditional model, guided to a class."""
    return np.asarray(guided_samples(form, scale, label)).ravel()


@pytest.mark.parametrize("form", ["epsilon", "mean"])
def test_weight_1_samples_the_class_and_0_the_mixture(form):
    for label in (0, 1):
        x = sample(form, 1.0, label)
        # Standard errors are 0.006; the discretization error is up to 0.02.
        assert abs(x.mean() - MEANS[label]) < 0.04 and abs(x.std() - STD) < 0.03
    x = sample(form, 0.0, 1)
    second = PRIORS @ (MEANS**2 + STD**2)
    assert abs(x.mean() - PRIORS @ MEANS) < 0.07
    assert abs(np.square(x).mean() - second) < 0.09


@pytest.mark.parametrize("form", ["epsilon", "mean"])
def test_the_posterior_of_the_class_grows_with_the_weight(form):
    first = jnp.zeros((N,), jnp.int32)  # t = 0
    cond = Cond.of(jnp.ones((N,), jnp.int32))
    posteriors = []
    for scale in (0.0, 1.0, 3.0, 8.0):
        x = jnp.asarray(sample(form, scale, 1)).reshape(N, 1, 1, 1)
        posteriors.append(float(np.exp(log_prob(x, first, cond)).mean()))
    assert abs(posteriors[0] - PRIORS[1]) < 0.03
    # Class 1 overlaps with the others. At weight 1 its posterior is the mean of p(y | x) under
    # p(x | y).
    generator = np.random.default_rng(0)
    data = generator.normal(MEANS[1], STD, (N, 1, 1, 1)).astype(np.float32)
    assert abs(posteriors[1] - float(np.exp(log_prob(data, first, cond)).mean())) < 0.03
    assert (np.diff(posteriors) > 0.05).all(), posteriors


@pytest.mark.parametrize("form", ["epsilon", "mean"])
@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_guided_gaussians_have_the_closed_form_statistics(form, scale):
    """Data is N(0, 1) and y is x_0 plus noise of variance 0.3, so each step is linear in x."""
    y, noise, steps = 1.4, 0.3, 20
    alpha_bar = SCHEDULE.alpha_bar[np.round(np.arange(1000, 0, -50)).astype(int) - 1]

    def linear(x, t, cond):  # E[eps | x_t], as x_t ~ N(0, 1)
        return jnp.sqrt(1 - SCHEDULE.alpha_bar_at(t, x.ndim)) * x

    def quadratic(x, t, cond):
        a = SCHEDULE.alpha_bar_at(t)
        return -((y - jnp.sqrt(a) * x[:, 0, 0, 0]) ** 2) / (2 * (noise + 1 - a))

    mean, variance = 0.0, 1.0
    for a, after in zip(alpha_bar, np.append(alpha_bar[1:], 1.0), strict=True):
        # gradient = slope x + offset
        slope, offset = -scale * a / (noise + 1 - a), scale * np.sqrt(a) * y / (noise + 1 - a)
        std = np.sqrt((1 - after) / (1 - a) * (1 - a / after)) if form == "mean" else 0.0
        shift = np.array([slope, offset]) * (std**2 if form == "mean" else -np.sqrt(1 - a))
        direction = np.sqrt(1 - after - std**2)
        eps_factor = direction - np.sqrt(after / a) * np.sqrt(1 - a)
        factor = np.sqrt(after / a) + eps_factor * np.sqrt(1 - a)
        if form == "epsilon":
            shift = eps_factor * shift
        mean = (factor + shift[0]) * mean + shift[1]
        variance = (factor + shift[0]) ** 2 * variance + std**2

    keys = jax.random.split(jax.random.key(2), N)
    x = initial_noise(keys, (1, 1, 1))
    if form == "mean":
        shift = classifier_gradient(quadratic, scale)
        run = partial(ddpm, linear, SCHEDULE, gradient=shift)
    else:
        run = partial(ddim, classifier_guidance(linear, quadratic, SCHEDULE, scale), SCHEDULE)
    out = np.asarray(jax.jit(partial(run, steps=steps))(x, None, keys)).ravel()
    assert abs(out.mean() - mean) < 5 * np.sqrt(variance / N)
    assert out.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / N))


def test_one_step_of_the_mean_by_hand():
    keys = jax.random.split(jax.random.key(3), 12)
    states = []

    def recording(x, t, cond):
        jax.debug.callback(lambda x: states.append(np.asarray(x, np.float64)), x, ordered=True)
        return UNCONDITIONAL(x, t, cond)

    shift = classifier_gradient(log_prob, 2.5)
    ddpm(recording, SCHEDULE, X, COND, keys, steps=4, gradient=shift)
    jax.effects_barrier()
    times = jnp.full((12,), 999)
    before, after = SCHEDULE.alpha_bar[999], SCHEDULE.alpha_bar[749]
    eps = np.asarray(UNCONDITIONAL(X, times, COND), np.float64)
    # The mean and variance are Eqs. 6 and 7 of arXiv:2006.11239, with alpha and beta of the whole
    # step. The shift is Alg. 1 of arXiv:2105.05233.
    alpha = before / after
    beta = 1 - alpha
    x0 = (np.asarray(X) - np.sqrt(1 - before) * eps) / np.sqrt(before)
    mean = np.sqrt(after) * beta * x0 + np.sqrt(alpha) * (1 - after) * np.asarray(X)
    variance = (1 - after) / (1 - before) * beta
    a = before
    weights = np.asarray(jax.nn.softmax(log_joint(X, jnp.full((12, 1, 1, 1), a))))
    centers, spread = np.sqrt(a) * MEANS, a * STD**2 + 1 - a
    class_centers = centers[np.asarray(COND.semantics)]
    gradient = (class_centers - weights @ centers) / spread  # of log p(x | y) - log p(x)
    noise = [jax.random.normal(jax.random.fold_in(key, 1), (1, 1, 1)) for key in keys]
    expected = (
        mean / (1 - before)
        + variance * 2.5 * gradient.reshape(12, 1, 1, 1)
        + np.sqrt(variance) * np.asarray(noise)
    )
    np.testing.assert_allclose(states[1], expected, atol=1e-3)
    assert np.abs(variance * gradient).max() > 0.02  # above the tolerance


@pytest.mark.parametrize("weight", [0.0, 0.5, 4.0])
def test_the_implicit_classifier_is_classifier_free_guidance(weight):
    """The weight w equals lambda = w + 1, and explicit guidance of the conditional denoiser."""
    guided = implicit_classifier_guidance(denoise, weight)(X, T, COND)
    np.testing.assert_array_equal(guided, dual_guidance(denoise, weight + 1)(X, T, COND))
    null = COND.drop(semantics=True, control=True)
    by_hand = (weight + 1) * denoise(X, T, COND) - weight * denoise(X, T, null)
    np.testing.assert_allclose(guided, by_hand, atol=1e-5)
    explicit = classifier_guidance(denoise, log_prob, SCHEDULE, weight)(X, T, COND)
    np.testing.assert_allclose(guided, explicit, atol=1e-3)
