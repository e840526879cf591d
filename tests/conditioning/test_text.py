"""Padding of text tokens (Eq. 7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.conditioning.cond import Text
from condiff_jax.conditioning.text import PADDINGS, pad

JUNK = [100.0, -100.0]


def text(rows, length=5, junk=JUNK):
    """Create one prompt with the valid tokens `rows`, and junk outside the mask."""
    tokens = jnp.asarray([*rows, *[junk] * (length - len(rows))], jnp.float32)[None]
    mask = jnp.arange(length)[None] < len(rows)
    return Text(tokens, mask, pooled=jnp.array([[0.5, 0.25, 0.125]]))


TWO = [[1.0, 10.0], [3.0, 14.0]]
NOISE = jax.random.normal(jax.random.key(0), (1, 5, 2))


def test_zero():
    out = pad(text(TWO), "zero").tokens[0]
    np.testing.assert_array_equal(out, [*TWO, [0, 0], [0, 0], [0, 0]])


def test_replicate_is_cyclic():
    out = pad(text(TWO), "replicate").tokens[0]
    np.testing.assert_array_equal(out, [TWO[0], TWO[1], TWO[0], TWO[1], TWO[0]])


def test_noisy_replicate_by_hand():
    # m = ceil(5 / 2) = 3 and sigma_ch = (1, 2), so the noise scale is sqrt(0.02) sqrt(3 - 1) = 0.2.
    out = pad(text(TWO), "noisy_replicate", beta=0.02, noise=NOISE).tokens[0]
    repeated = np.array([TWO[0], TWO[1], TWO[0], TWO[1], TWO[0]])
    np.testing.assert_allclose(out, repeated + 0.2 * np.array([1, 2]) * NOISE[0], atol=1e-5)


@pytest.mark.parametrize("n, repeats", [(1, 5), (2, 3), (3, 2), (4, 2), (5, 1)])
def test_repetitions(n, repeats):
    rows = np.arange(2 * n).reshape(n, 2) ** 2.0
    out = pad(text(rows), "noisy_replicate", beta=0.5, noise=jnp.ones((1, 5, 2))).tokens[0]
    expected = rows[np.arange(5) % n] + np.sqrt(0.5 * (repeats - 1)) * rows.std(0)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("method", PADDINGS)
def test_full_prompt_is_unchanged(method):
    full = text(np.arange(10.0).reshape(5, 2))
    out = pad(full, method, beta=0.5, noise=NOISE)
    np.testing.assert_array_equal(out.tokens, full.tokens)


@pytest.mark.parametrize("method", PADDINGS)
def test_mask_and_pooled_pass_through(method):
    out = pad(text(TWO), method, beta=0.5, noise=NOISE)
    np.testing.assert_array_equal(out.mask, [[True, True, False, False, False]])
    np.testing.assert_array_equal(out.pooled, [[0.5, 0.25, 0.125]])


@pytest.mark.parametrize("method", PADDINGS)
def test_tokens_outside_the_mask_have_no_effect(method):
    def padded(tokens):
        return pad(text(TWO).replace(tokens=tokens), method, beta=0.5, noise=NOISE).tokens

    changed = text(TWO, junk=[3e4, 7.0]).tokens
    np.testing.assert_array_equal(padded(text(TWO).tokens), padded(changed))
    gradient = jax.grad(lambda tokens: (padded(tokens) ** 2).sum())(changed)
    np.testing.assert_array_equal(gradient[0, 2:], 0)
    assert (np.abs(gradient[0, :2]) > 0).all()


@pytest.mark.parametrize("rows", [[[1.0, 2.0]], [[1.0, 2.0], [1.0, 5.0]]])
def test_gradient_is_finite_where_tokens_do_not_vary(rows):
    def loss(tokens):
        padded = pad(text(rows).replace(tokens=tokens), "noisy_replicate", beta=0.5, noise=NOISE)
        return (padded.tokens**2).sum()

    assert np.isfinite(jax.grad(loss)(text(rows).tokens)).all()


def test_noise_statistics_of_each_prompt():
    # Each prompt in a batch has its own m and sigma_ch.
    prompts = [text(TWO), text([[0.0, 1.0], [6.0, 1.0], [0.0, 1.0]])]
    batch = jax.tree.map(lambda *a: jnp.concatenate(a), *prompts)
    noise = jax.random.normal(jax.random.key(1), (4000, 2, 5, 2))
    draw = jax.vmap(lambda eps: pad(batch, "noisy_replicate", beta=0.08, noise=eps).tokens)
    error = np.asarray(draw(noise) - pad(batch, "replicate").tokens)
    # m is 3 and 2, sigma_ch is (1, 2) and (sqrt 8, 0).
    expected = np.sqrt([[2 * 0.08, 2 * 0.08 * 4], [0.08 * 8, 0]])
    np.testing.assert_allclose(error.std((0, 2)), expected, rtol=0.03)  # 20000 draws: 0.5%
    np.testing.assert_allclose(error.mean((0, 2)), 0, atol=0.03)


def test_errors():
    with pytest.raises(ValueError, match="unknown text padding 'mirror', choose from zero"):
        pad(text(TWO), "mirror")
    with pytest.raises(ValueError, match="noisy_replicate padding needs noise"):
        pad(text(TWO), "noisy_replicate", beta=0.5)
