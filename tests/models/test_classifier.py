"""Noisy classifier: the encoder of the UNet, adaptive norms, and attention pooling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import parity
from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.control import Weighting
from condiff_jax.models.classifier import AttentionPool, Classifier
from condiff_jax.models.unet import ResNetBlock, Size, UNet
from condiff_jax.runtime import sharding

SMALL = Size((8, 16), (False, True), 12, heads=2, resnets=1)
X = np.random.default_rng(0).normal(size=(2, 4, 8, 3)).astype(np.float32)
T = np.array([3, 700], np.int32)


@pytest.fixture(scope="module")
def built():
    model = Classifier(SMALL, 5)
    shapes = jax.eval_shape(model.init, jax.random.key(0), X, T)["params"]
    return model, parity.random_like(shapes)


def test_every_parameter_has_a_sharding(built):
    mesh = sharding.create_mesh(2)
    sharding.tree_shardings(mesh, {"classifier": built[1]})  # raises for a parameter without one


def test_it_is_the_encoder_half_of_the_unet(built):
    whole = UNet(SMALL, 5, Weighting("cosine"), adaptive=True)
    cond = Cond.of(jnp.array([0, 1]))
    shapes = jax.eval_shape(whole.init, jax.random.key(0), X, T, cond)["params"]
    half = {name for name in shapes if name.startswith(("conv_in", "timestep", "down", "mid"))}
    half -= {"mid_resnet_1"}
    assert set(built[1]) == half | {"norm_out", "pool", "head"}
    for name in half:  # the classifier has no cross-attention
        expected = {
            part: leaf for part, leaf in shapes[name].items() if not part.startswith("cross")
        }
        assert jax.tree.map(jnp.shape, built[1][name]) == jax.tree.map(lambda a: a.shape, expected)


def test_logits_depend_on_images_and_on_the_timestep(built):
    model, params = built
    logits = parity.jit(lambda x, t: model.apply({"params": params}, x, t))
    first = logits(X, T)
    assert first.shape == (2, 5) and first.dtype == jnp.float32
    assert np.abs(first - logits(X[::-1], T)).max() > 1e-2
    changed = np.abs(first - logits(X, T + np.array([0, 200], np.int32)))
    assert changed[1].max() > 1e-3 and changed[0].max() < 1e-5  # only t[1] changed


def test_logits_are_zero_at_initialization():
    model = Classifier(SMALL, 5)
    logits = parity.jit(lambda key: model.apply(model.init(key, X, T), X, T))
    assert not np.abs(logits(jax.random.key(0))).max()


def test_pooling_by_hand_and_invariant_to_the_order_of_pixels():
    pool = AttentionPool(heads=2)
    x = np.random.default_rng(1).normal(size=(2, 3, 2, 8)).astype(np.float32)
    params = pool.init(jax.random.key(0), x)["params"]
    out = pool.apply({"params": params}, x)
    mixed = x.reshape(2, 6, 8)[:, [3, 1, 5, 0, 2, 4]].reshape(x.shape)
    np.testing.assert_allclose(pool.apply({"params": params}, mixed), out, atol=1e-5)

    def project(name, a):
        part = params["attention"][name]["linear"]
        return np.einsum("btc,chd->bthd", a, part["kernel"]) + part["bias"]

    def rms(a):
        return a / np.sqrt(np.square(a).mean(-1, keepdims=True) + 1e-6)

    pixels = x.reshape(2, 6, 8)
    q = rms(project("query", pixels.mean(1, keepdims=True)))
    k, v = rms(project("key", pixels)), project("value", pixels)
    weights = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2)  # head size 4
    weights /= weights.sum(-1, keepdims=True)
    merged = np.einsum("bhqk,bkhd->bqhd", weights, v)[:, 0]
    last = params["attention"]["out"]["linear"]
    expected = np.einsum("bhd,hdc->bc", merged, last["kernel"]) + last["bias"]
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_resnet_blocks_of_denoisers_can_be_conditioned_by_adagn():
    """With `adaptive`, the embedding scales and shifts the second norm instead of being added."""
    block = ResNetBlock(8, groups=2, adaptive=True)
    x = np.random.default_rng(2).normal(size=(2, 4, 4, 8)).astype(np.float32)
    timestep, label = np.random.default_rng(3).normal(size=(2, 2, 6)).astype(np.float32)
    shapes = jax.eval_shape(block.init, jax.random.key(0), x, timestep)["params"]
    assert set(shapes) == {"norm1", "conv1", "norm2", "conv2"}
    assert set(shapes["norm2"]) == {"projection"}
    params = parity.random_like(shapes)
    run = parity.jit(lambda emb: block.apply({"params": params}, x, emb))
    both = run(timestep + label)
    assert np.abs(both - run(timestep)).max() > 1e-2
