"""Pixel and latent spaces: scale, shift, and training on the latents of a frozen autoencoder."""

from functools import cache, partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.parity import jit, random_like
from condiff_jax.config.errors import ConfigError
from condiff_jax.models.autoencoder import Latents, Pixels
from condiff_jax.models.kl import SIZES, AutoencoderKL, Size, mean_and_std
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.sampling import sample
from condiff_jax.training import loop
from tests import tiny

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
NETWORK = AutoencoderKL(Size((8, 16), resnets=1))  # replaces the size tiny in this module


@pytest.fixture(autouse=True, scope="module")
def tiny_autoencoder():
    with mock.patch.dict(SIZES, {"tiny": NETWORK.size}):
        yield


@cache
def parameters():
    shapes = jax.eval_shape(NETWORK.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return random_like(shapes["params"])


@partial(jit, static_argnames="method")
def network(params, x, method):
    return NETWORK.apply({"params": params}, x, method=method)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (2.0, 0.0), (0.5, -0.25)])
def test_pixels_are_scaled_and_decoded(scale, shift):
    space = Pixels(scale, shift)
    x = space.encode(None, IMAGES, None)
    np.testing.assert_allclose(x, (IMAGES / 127.5 - 1 - shift) * scale, atol=1e-6)
    assert np.abs(x).max() <= space.bound
    np.testing.assert_array_equal(space.decode(None, x), IMAGES)


def test_latents_are_sampled_scaled_and_decoded():
    params, space = parameters(), Latents(NETWORK, scale=0.5, shift=0.25)
    assert (space.factor, space.channels) == (2, 4)
    moments = network(params, IMAGES / 127.5 - 1, "encode")
    mean, std = mean_and_std(moments)
    noise = np.random.default_rng(1).normal(size=mean.shape).astype(np.float32)
    x = jit(space.encode)(params, IMAGES, noise)
    np.testing.assert_allclose(x, (mean + std * noise - 0.25) * 0.5, rtol=1e-4, atol=1e-4)
    images = network(params, x / 0.5 + 0.25, "decode")
    expected = np.clip(np.round((images + 1) * 127.5), 0, 255)
    assert np.abs(jit(space.decode)(params, x).astype(int) - expected).max() <= 1


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folder with an autoencoder in diffusers' format."""
    state = key_maps.to_published(to_torch(parameters()), key_maps.AUTOENCODER)
    folder = tmp_path_factory.mktemp("vae")
    save_file(
        {name: np.ascontiguousarray(a) for name, a in state.items()},
        folder / "diffusion_pytorch_model.safetensors",
    )
    return folder


LATENT = {"autoencoder.name": "kl", "autoencoder.size": "tiny", "autoencoder.scale": 0.2}


def test_an_objective_on_latents_has_their_shape_and_these_weights(weights):
    objective = tiny.objective(tiny.config(**LATENT, **{"autoencoder.path": str(weights)}))
    assert objective.latent_shape == (8, 8, 4)
    loaded = objective.load_frozen()["autoencoder"]
    jax.tree.map(np.testing.assert_array_equal, loaded, parameters())


@pytest.mark.slow
def test_training_and_sampling_on_latents(weights, tmp_path):
    fields = {**LATENT, "autoencoder.path": str(weights), "model.size": "tiny/2"}
    config = tiny.config(steps=2, **fields, **{"log.every": 1})
    with tiny.few_layers():
        loop.run(config, str(tmp_path))
        folder = sample.run(
            tiny.config(steps=2, **fields, **{"sampling.prompts": "a ring"}),
            str(tmp_path),
        )
    assert len(list(folder.glob("0*.png"))) == 4


def test_old_names_of_the_attention_are_supported(weights, tmp_path):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(weights / "diffusion_pytorch_model.safetensors")
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): a for key, a in state.items()}
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
    save_file(state, tmp_path / "x.safetensors")
    objectives = (
        tiny.objective(tiny.config(**LATENT, **{"autoencoder.path": str(path)}))
        for path in (weights, tmp_path)
    )
    jax.tree.map(np.testing.assert_array_equal, *(o.load_frozen() for o in objectives))


def test_noise_has_the_shape_of_the_latents(weights):
    config = tiny.config(**LATENT, **{"autoencoder.path": str(weights), "data.resolution": 16})
    objective = tiny.objective(config)
    noise = objective.draw_noise(jax.random.key(0), 2)
    assert noise["latent"].shape == (2, 8, 8, 4)


@pytest.mark.parametrize("name", ["pixels", "kl"])
def test_scale_and_shift_come_from_the_config(name):
    fields = {"autoencoder.name": name, "autoencoder.scale": 0.5, "autoencoder.shift": 0.25}
    space = tiny.objective(tiny.config(**fields, **{"data.resolution": 32})).autoencoder
    assert (space.scale, space.shift) == (0.5, 0.25)


@pytest.mark.parametrize("path, message", [("", "empty; latents"), ("/no/such", "does not exist")])
def test_missing_weights_are_named(path, message):
    config = tiny.config(**LATENT, **{"autoencoder.path": path})
    with pytest.raises(ConfigError, match=f"autoencoder.path.*{message}"):
        tiny.objective(config).load_frozen()


def test_misfit_weights_are_named(tmp_path):
    save_file({"encoder.conv_in.weight": np.zeros((1, 1), np.float32)}, tmp_path / "x.safetensors")
    config = tiny.config(**LATENT, **{"autoencoder.path": str(tmp_path)})
    with pytest.raises(ConfigError, match="autoencoder.path: weights do not fit: missing .* more"):
        tiny.objective(config).load_frozen()
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="autoencoder.path: .* cannot be read"):
        tiny.objective(config).load_frozen()
