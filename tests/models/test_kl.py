"""AutoencoderKL: parity with diffusers' AutoencoderKL, and the size of Stable Diffusion's."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from benchmarks import parity
from condiff_jax.models.kl import SIZES, AutoencoderKL, mean_and_std
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch

SMALL = parity.KL


def random_images(height, width, seed=0, channels=3):
    shape = (2, height, width, channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def random_like(shapes, seed=0):
    """Random parameters, nonzero also where the initialization is zero."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        size = (leaf.size // leaf.shape[-1]) ** -0.5 if leaf.ndim > 1 else 0.2
        return jnp.asarray(center + size * generator.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(size=SMALL, **settings):
    """(model, random parameters)."""
    model = AutoencoderKL(size, **settings)
    shapes = jax.eval_shape(model.init, jax.random.key(0), random_images(8, 8))["params"]
    return model, random_like(shapes)


@partial(parity.jit, static_argnums=(0, 1))
def run(model, method, params, x):
    return model.apply({"params": params}, x, method=method)


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).detach().numpy()


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("height, width", [(8, 8), (12, 16)])
def test_agrees_with_diffusers(height, width):
    model, params = build()
    # Small features make the epsilons of the norms matter.
    params = jax.tree.map(lambda a: 0.05 * a if a.ndim == 4 else a, params)
    reference = parity.diffusers_kl(8)
    parity.load(reference, key_maps.to_published(to_torch(params), key_maps.AUTOENCODER))
    x = random_images(height, width)
    moments = run(model, "encode", params, x)
    assert moments.shape == (2, height // 2, width // 2, 6)
    assert relative(moments, nhwc(reference.encode(nchw(x)).latent_dist.parameters)) < 1e-5
    latents = random_images(height // 2, width // 2, seed=1, channels=3)
    images = run(model, "decode", params, latents)
    assert images.shape == x.shape
    assert relative(images, nhwc(reference.decode(nchw(latents)).sample)) < 1e-5


def test_mean_and_std_agree_with_diffusers():
    moments = 60 * random_images(4, 4, channels=6)  # log-variances beyond both bounds
    reference = DiagonalGaussianDistribution(nchw(moments))
    mean, std = mean_and_std(jnp.asarray(moments))
    np.testing.assert_array_equal(mean, nhwc(reference.mean))
    np.testing.assert_allclose(std, nhwc(reference.std), rtol=1e-6)
    assert std.min() == pytest.approx(np.exp(-15)) and std.max() == pytest.approx(np.exp(10))


def test_call_decodes_the_mean():
    model, params = build()
    x = random_images(8, 8)
    mean, _ = mean_and_std(run(model, "encode", params, x))
    expected = run(model, "decode", params, mean)
    np.testing.assert_allclose(run(model, None, params, x), expected, atol=1e-5)


def test_bf16_is_close_to_f32():
    f32, params = build()
    bf16, bf16_params = build(dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, bf16_params) == jax.tree.map(lambda a: a.dtype, params)
    latents = random_images(4, 4, seed=1, channels=3)
    for method, x in (("encode", random_images(8, 8)), ("decode", latents)):
        a, b = (run(model, method, params, x) for model in (f32, bf16))
        assert a.dtype == b.dtype == jnp.float32
        error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
        assert 1e-4 < error < 0.03  # bf16 rounds each operation by up to 0.4%


def test_sd_has_the_size_of_stable_diffusion():
    model = AutoencoderKL(SIZES["sd"])
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert count == pytest.approx(83.65e6, rel=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_factor_is_the_reduction_of_sides(name):
    model = AutoencoderKL(SIZES[name])
    side = 4 * model.size.factor
    moments = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, method="encode")[0],
        jax.ShapeDtypeStruct((1, side, 2 * side, 3), jnp.float32),
    )
    assert moments.shape == (1, 4, 8, 2 * model.size.latent)
