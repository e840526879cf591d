"""AutoencoderVQ: parity with diffusers' VQModel, and quantization."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import parity
from condiff_jax.models.kl import Size
from condiff_jax.models.vq import AutoencoderVQ
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch

SMALL = Size((8, 16), latent=3, codes=12)
MODEL = AutoencoderVQ(SMALL)


@pytest.fixture(scope="module")
def params():
    x = jnp.zeros((1, 8, 8, 3))
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), x)["params"]
    return parity.random_like(shapes)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def call(params, method, x):
    return parity.jit(lambda params, x: MODEL.apply({"params": params}, x, method=method))(
        params, x
    )


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def test_agrees_with_diffusers(params):
    reference = diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=SMALL.channels,
        layers_per_block=SMALL.resnets,
        latent_channels=SMALL.latent,
        num_vq_embeddings=SMALL.codes,
        norm_num_groups=SMALL.groups,
    ).eval()
    parity.load(reference, key_maps.to_published(to_torch(params), key_maps.AUTOENCODER))
    images, latents = draw(2, 8, 12, 3), draw(2, 4, 6, 3, seed=1)
    with torch.no_grad():
        encoded = reference.encode(nchw(images)).latents.permute(0, 2, 3, 1).numpy()
        decoded = reference.decode(nchw(latents)).sample.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(call(params, "encode", images), encoded, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(call(params, "decode", latents), decoded, rtol=1e-4, atol=1e-5)


def test_quantize_takes_the_nearest_code(params):
    latents, codebook = draw(2, 3, 5, 3), params["codebook"]["embedding"]
    codes, indices = call(params, "quantize", latents)
    distance = np.linalg.norm(latents[..., None, :] - np.asarray(codebook), axis=-1)
    np.testing.assert_array_equal(indices, distance.argmin(-1))
    np.testing.assert_array_equal(codes, np.asarray(codebook)[indices])
    again, _ = call(params, "quantize", codes)
    np.testing.assert_array_equal(again, codes)  # codes are their own nearest


def test_quantization_has_a_straight_through_gradient(params):
    latents, weights = draw(1, 4, 4, 3), draw(1, 8, 8, 3, seed=2)

    def through(x):
        return (weights * MODEL.apply({"params": params}, x, method="decode")).sum()

    codes, _ = call(params, "quantize", latents)
    assert np.abs(codes - latents).max() > 0.1
    gradient = parity.jit(jax.grad(through))
    np.testing.assert_allclose(gradient(latents), gradient(codes), rtol=1e-3, atol=1e-3)
    assert np.abs(gradient(latents)).max() > 1e-3


def test_sample_has_no_noise():
    latents = draw(1, 2, 2, 3)
    assert MODEL.sample(latents, np.ones_like(latents)) is latents
