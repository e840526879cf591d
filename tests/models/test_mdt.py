"""Masking of MDTv2: hidden tokens and their shares; parity is in test_parity."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import CLASS, T, class_mdt, jit, noise, random_like
from condiff_jax.models.mdt import hide, max_visible, relative_index
from tests import tiny

SIDE = 8  # 16 tokens


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_shares_of_hidden_tokens_fill_the_range(ratio):
    tokens = 100
    counts = np.asarray(hide(jax.random.key(0), 4000, tokens, ratio).sum(1))
    low, high = np.array([ratio, ratio + 0.2]) * tokens
    assert counts.min() == pytest.approx(low, abs=1) and counts.max() == pytest.approx(high, abs=1)
    assert counts.min() >= tokens - max_visible(tokens, ratio)
    assert counts.mean() == pytest.approx((low + high + 1) / 2, abs=0.5)
    each = np.asarray(hide(jax.random.key(1), 4000, tokens, ratio).mean(0))
    assert np.abs(each - each.mean()).max() < 0.05  # all tokens equally often


def test_relative_index_depends_on_the_offset():
    index = relative_index(2, 3)
    assert index.shape == (6, 6) and index.min() == 0 and index.max() == 3 * 5 - 1
    # Pairs with the same offset share a row: 0 -> 4 and 1 -> 5 are one down, one to the right.
    assert index[0, 4] == index[1, 5] != index[0, 5]
    assert len(np.unique(index)) == 15


@jit
def apply(params, x, hidden=None):
    return class_mdt(SIDE).apply({"params": params}, x, T, CLASS, hidden=hidden)


def masked(params, x, hidden):
    return np.asarray(apply(params, x, hidden))


@cache
def shapes():
    return jax.eval_shape(class_mdt(SIDE).init, jax.random.key(0), noise(SIDE), T, CLASS)["params"]


def parameters():
    return random_like(shapes())


def test_hidden_tokens_do_not_affect_the_encoder():
    # Without the decoder's skip from the input, hidden tokens cannot change the output.
    params = parameters()
    skip = params["decoder_blocks"]["skip"]
    width = skip["kernel"].shape[-1]
    skip["kernel"] = skip["kernel"].at[:, width:].set(0)
    hidden = jnp.zeros((2, 16), bool).at[:, :6].set(True)  # the first row and half of the second
    x, changed = noise(SIDE), noise(SIDE)
    changed[:, :2] += 1.0
    np.testing.assert_array_equal(masked(params, x, hidden), masked(params, changed, hidden))
    changed[:, 7:] += 1.0
    assert np.abs(masked(params, x, hidden) - masked(params, changed, hidden)).max() > 1e-3


def test_samples_may_hide_different_numbers_of_tokens():
    params = parameters()
    hidden = jnp.zeros((2, 16), bool).at[0, :5].set(True).at[1, 3:11].set(True)
    together = masked(params, noise(SIDE), hidden)
    for i in range(2):
        alone = masked(params, noise(SIDE), jnp.tile(hidden[i], (2, 1)))
        np.testing.assert_allclose(together[i], alone[i], atol=1e-4)


def test_side_block_and_mask_token_serve_the_masked_pass_only():
    params = parameters()
    changed = params | {
        "side_block": jax.tree.map(lambda a: a + 1, params["side_block"]),
        "mask_token": params["mask_token"] + 1,
    }
    np.testing.assert_array_equal(*(apply(p, noise(SIDE)) for p in (params, changed)))
    hidden = jnp.zeros((2, 16), bool).at[:, 2:8].set(True)
    assert np.abs(masked(params, noise(SIDE), hidden) - masked(changed, noise(SIDE), hidden)).max()


@pytest.mark.parametrize("ratio, trained", [(0.3, True), (0.0, False)])
def test_training_adds_the_masked_loss(ratio, trained):
    overrides = {"model.name": "mdtv2", "data.semantics": "class", "model.mask_ratio": ratio}
    with tiny.few_layers():
        objective = tiny.objective(tiny.config(**overrides))
    params, batch = random_like(objective.shapes), objective.example(4)
    noise = objective.draw_noise(jax.random.key(0), 4)
    assert ("hidden" in noise) == trained

    @jit
    @jax.value_and_grad
    def loss_and_gradient(token, noise):
        changed = params | {"model": params["model"] | {"mask_token": token}}
        return objective.loss(changed, batch, noise)[0]

    token = params["model"]["mask_token"]
    loss, gradient = loss_and_gradient(token, noise)
    assert bool(np.any(gradient)) == trained
    without = {name: value for name, value in noise.items() if name != "hidden"}
    plain, _ = loss_and_gradient(token, without)
    assert (float(loss) > float(plain) * 1.2) == trained
