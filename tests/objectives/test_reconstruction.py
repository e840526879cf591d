"""The objective of autoencoders: terms of the loss, gradients, training and export."""

import dataclasses
import functools
import json
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import parity
from condiff_jax.config.errors import ConfigError
from condiff_jax.data.augment import center
from condiff_jax.data.pipeline import create_source
from condiff_jax.models import kl
from condiff_jax.models.autoencoder import Latents, to_float
from condiff_jax.models.discriminator import PatchDiscriminator
from condiff_jax.models.kl import Size, mean_and_std
from condiff_jax.models.vq import AutoencoderVQ
from condiff_jax.objectives import reconstruction
from condiff_jax.objectives.validate import create_config
from condiff_jax.pretrained import lpips
from condiff_jax.training import loop
from condiff_jax.training.reporters import autoencoder as autoencoder_reporter
from condiff_jax.training.reporters.autoencoder import standardize
from configs import autoencoder, emoji_64, latent_shapes
from tests import tiny

SMALL = Size((8,), latent=3, resnets=1, codes=16)
NOISE = np.random.default_rng(1).normal(size=(2, 16, 16, 3)).astype(np.float32)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)

WEIGHTS = {
    "kl": 0.5, "codebook": 3.0, "commitment": 0.5, "anchor": 0.2, "critic": 0.3, "critic_start": 7,
}  # fmt: skip


@functools.cache
def create(name):
    """(objective, the function of its loss and gradient)."""
    fields = {f"reconstruction.{key}": value for key, value in WEIGHTS.items()}
    fields |= {"autoencoder.name": name, "autoencoder.size": "tiny", "data.resolution": 16}
    config = tiny.config(**fields)
    space = Latents.create(config)
    network = dataclasses.replace(space.network, size=SMALL)
    space = dataclasses.replace(space, network=network)
    objective = reconstruction.ReconstructionObjective(config, space, PatchDiscriminator((8, 16)))
    loss = objective.loss
    return objective, parity.jit(jax.value_and_grad(loss, has_aux=True))


def evaluate(name, params, critic):
    """((loss, parts), gradient); critic: weight of the generator loss."""
    noise = {"latent": NOISE, "critic": jnp.full((2,), critic)}
    return create(name)[1](params, {"image": jnp.asarray(IMAGES)}, noise)


def parameters(objective):
    return parity.random_like(objective.shapes)


def norm(tree):
    return float(np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(tree))))


def test_the_loss_is_the_weighted_sum_of_its_parts():
    objective, _ = create("kl")
    params = parameters(objective)
    (loss, parts), _ = evaluate("kl", params, critic=2.0)
    images = to_float(IMAGES)

    @parity.jit
    def run(params):
        network, variables = objective.space.network, {"params": params["autoencoder"]}
        mean, std = mean_and_std(network.apply(variables, images, method="encode"))
        decoded = network.apply(variables, mean + std * NOISE, method="decode")
        apply = functools.partial(objective.discriminator.apply, {"params": params["critic"]})
        return mean, std, decoded, apply(images), apply(decoded)

    mean, std, decoded, *logits = jax.device_get(run(params))
    l1 = np.abs(decoded - images).mean()
    kl = float((0.5 * (mean**2 + std**2 - 1 - 2 * np.log(std))).sum() / images.size)
    critic = 0.5 * np.maximum(1 - logits[0], 0).mean() + 0.5 * np.maximum(1 + logits[1], 0).mean()
    assert parts == pytest.approx({"l1": l1, "kl": kl, "critic": critic}, rel=1e-3)
    expected = float(l1 + 0.5 * kl - 2 * logits[1].mean() + critic)
    assert float(loss) == pytest.approx(expected, rel=1e-3)


def test_kl_divergence_agrees_with_monte_carlo():
    moments = np.array([0.7, -0.4, 0.5, -1.0], np.float32).reshape(1, 1, 1, 4)  # means, log var
    mean, std = mean_and_std(moments)
    mean, std = np.asarray(mean), np.asarray(std)
    z = mean + std * np.random.default_rng(0).normal(size=(200_000, 1, 1, 2))
    log_q = -0.5 * ((z - mean) / std) ** 2 - np.log(std)
    estimate = (log_q + 0.5 * z**2).sum((1, 2, 3)).mean()
    assert reconstruction.kl_divergence(moments)[0] == pytest.approx(estimate, rel=0.02)
    assert reconstruction.kl_divergence(np.zeros((1, 2, 2, 4), np.float32))[0] == 0


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_autoencoder_and_discriminator_get_their_own_gradients(name):
    params = parameters(create(name)[0])
    _, weighted = evaluate(name, params, critic=1.0)
    _, zero = evaluate(name, params, critic=0.0)
    # The generator loss has gradients for the autoencoder only.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        weighted["critic"],
        zero["critic"],
    )
    assert norm(weighted["critic"]) > 1e-3
    difference = jax.tree.map(np.subtract, weighted["autoencoder"], zero["autoencoder"])
    assert norm(difference) > 1e-3


def test_codes_move_to_latents_and_latents_to_codes():
    objective, _ = create("vq")
    params = parameters(objective)
    ((_, parts), gradient) = evaluate("vq", params, critic=0.0)
    network = objective.space.network
    assert isinstance(network, AutoencoderVQ)
    variables = {"params": params["autoencoder"]}

    @parity.jit
    def run(variables):
        latents = network.apply(variables, to_float(IMAGES), method="encode")
        return latents, *network.apply(variables, latents, method="quantize")

    latents, codes, indices = jax.device_get(run(variables))
    assert parts["codebook"] == pytest.approx(float(np.square(latents - codes).mean()), rel=1e-3)
    # Two terms have gradients for the codes e: 3 * d/de mean (z - e)^2 over all latents z, and the
    # same over the latent nearest to each code.
    codebook = np.asarray(variables["params"]["codebook"]["embedding"])
    points = np.asarray(latents).reshape(-1, 3)
    nearest = points[np.linalg.norm(codebook[:, None] - points, axis=-1).argmin(1)]
    assert parts["anchor"] == pytest.approx(float(np.square(codebook - nearest).mean()), rel=1e-3)
    expected = np.zeros((SMALL.codes, 3))
    np.add.at(expected, np.asarray(indices).ravel(), np.asarray(codes - latents).reshape(-1, 3))
    assert (
        len(set(np.asarray(indices).ravel())) < SMALL.codes
    )  # some codes have the second term only
    expected = 3 * 2 * (expected / latents.size + 0.2 * (codebook - nearest) / codebook.size)
    actual = gradient["autoencoder"]["codebook"]["embedding"]
    np.testing.assert_allclose(actual, expected, rtol=1e-2, atol=1e-5)


def test_the_generator_loss_has_weight_zero_before_critic_start():
    objective, _ = create("kl")
    key = jax.random.key(0)
    early, late = (objective.draw_noise(key, 2, step) for step in (6, 7))
    assert early["critic"].tolist() == [0, 0]
    np.testing.assert_allclose(late["critic"], 0.3)
    assert late["latent"].shape == NOISE.shape
    np.testing.assert_array_equal(early["latent"], late["latent"])


def test_lpips_has_finite_gradients_where_features_are_zero():
    convolutions = {
        f"conv_{i}": {"kernel": np.zeros((k, k, n, width), np.float32), "bias": np.zeros(width)}
        for i, (n, (width, k, _, _)) in enumerate(
            zip((3, 64, 192, 384, 256), lpips.ALEXNET, strict=True)
        )
    }
    heads = [np.ones(width, np.float32) for width, *_ in lpips.ALEXNET]
    frozen = {"alexnet": convolutions, "heads": heads}
    x = jnp.asarray(IMAGES[:1], jnp.float32)
    slope = jax.grad(lambda y: lpips.distance(frozen, x, y).sum())(x + 1)
    assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_standardized_autoencoders_decode_alike(name):
    objective, _ = create(name)
    network, old = objective.space.network, parameters(objective)["autoencoder"]
    shift, scale = np.array([0.5, -1.0, 2.0], np.float32), 0.25
    new = standardize(network, old, shift, scale)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, old)

    @parity.jit
    def run(params):
        moments = network.apply({"params": params}, to_float(IMAGES), method="encode")
        latents = network.sample(moments, NOISE)
        return latents, network.apply({"params": params}, latents, method="decode")

    (before, images), (after, again) = run(old), run(new)
    np.testing.assert_allclose(after, (before - shift) * scale, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(again, images, rtol=1e-3, atol=1e-3)


FIELDS = {
    "autoencoder.name": "vq", "autoencoder.size": "tiny", "data.resolution": 16,
    "log.samples": 2, "log.every": 1, "checkpoint.every": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The work directory of an autoencoder after two steps."""
    path = tmp_path_factory.mktemp("autoencoder")
    with (
        mock.patch.object(autoencoder_reporter, "IMAGES", 8),
        mock.patch.dict(kl.SIZES, {"tiny": SMALL}),
        tiny.few_layers(),
    ):
        config = tiny.config(steps=2, objective="reconstruction", **FIELDS)
        assert loop.run(config, str(path))
        yield path


def latent_config(trained):
    latent = {"autoencoder.path": str(trained / "autoencoder"), "model.size": "tiny/2"}
    return tiny.config(steps=2, **FIELDS | latent | {"sampling.n": 2})


def test_training_logs_and_evaluates(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {"loss", "l1", "codebook", "critic", "images_per_sec"} <= lines[0].keys()
    (record,) = [json.loads(line) for line in (trained / "evaluation.jsonl").open()]
    assert record["step"] == 2 and 0 < record["psnr"] < 30 and 0 < record["codebook_usage"] <= 1
    assert np.asarray(Image.open(trained / "samples/2.png")).std() > 10
    config = tiny.config(steps=2, objective="reconstruction", **FIELDS)
    assert loop.run(config, str(trained))  # nothing to do
    assert len((trained / "evaluation.jsonl").read_text().splitlines()) == 1


def test_latent_diffusion_and_diffusers_load_a_trained_autoencoder(trained):
    config = latent_config(trained)
    params = tiny.objective(config).load_frozen()["autoencoder"]
    source = create_source(config, "validation")
    images = to_float(np.stack([center(source[i]["image"], 16) for i in range(8)]))
    encode = functools.partial(Latents.create(config).network.apply, method="encode")
    latents = np.asarray(parity.jit(encode)({"params": params}, images))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-3)
    assert np.square(latents).mean() == pytest.approx(1, rel=1e-3)
    model = diffusers.VQModel.from_pretrained(trained / "autoencoder")
    nchw = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        actual = model.encode(nchw).latents.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(actual, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_latent_diffusion_is_trained_with_a_trained_autoencoder(trained, tmp_path):
    assert loop.run(latent_config(trained), str(tmp_path))
    assert (tmp_path / "samples/2.png").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"autoencoder.name": "pixels"}, "autoencoder.name: .* needs kl or vq"),
        ({"init.path": "x"}, "init.path: must be empty"),
        ({"evaluation.metrics": ("prompt_accuracy",)}, "evaluation.metrics: must be empty"),
    ],
)
def test_fields_that_reconstruction_does_not_take_are_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(objective="reconstruction", **{**FIELDS, **fields})


def test_an_autoencoder_is_not_sampled():
    with pytest.raises(ConfigError, match="objective: reconstruction has no denoiser"):
        tiny.objective(tiny.config(objective="reconstruction", **FIELDS))


def test_configs_train_what_they_say():
    for reg in ("kl", "vq"):
        config = create_config(autoencoder.get_config(f"reg={reg}"))
        assert config.objective == "reconstruction" and config.autoencoder.name == reg
        latents = latent_shapes.get_config(f"reg={reg}"), emoji_64.get_config(f"space={reg}")
        for latent in map(create_config, latents):
            assert latent.objective == "diffusion"
            assert config.autoencoder.name == latent.autoencoder.name
            assert config.autoencoder.size == latent.autoencoder.size
            assert latent.autoencoder.scale == 1 and latent.autoencoder.shift == 0
    with pytest.raises(ValueError, match="reg=gan is unknown"):
        autoencoder.get_config("reg=gan")
