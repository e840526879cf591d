"""The objective of autoencoders (arXiv:2112.10752, App. G).

The loss of a decoded image is L1 and LPIPS to the original, the generator loss of a patch
discriminator, and a regularizer of the latents: divergence from a standard normal distribution (KL)
or distance to a codebook (VQ).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath

from condiff_jax.config.errors import config_errors
from condiff_jax.config.schema import Config
from condiff_jax.models.autoencoder import Latents, to_float
from condiff_jax.models.discriminator import PatchDiscriminator
from condiff_jax.models.kl import AutoencoderKL, mean_and_std
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained import lpips
from condiff_jax.runtime import flops


@dataclasses.dataclass(frozen=True)
class Lpips:
    """Loader of the LPIPS parameters in `evaluation.lpips`."""

    path: str
    field: str = "evaluation.lpips"

    def files(self) -> list[epath.Path]:
        """Files with the parameters."""
        return [epath.Path(self.path)]

    def load(self) -> dict:
        """Load the parameters; ConfigError if they are missing."""
        with config_errors(self.field):
            return lpips.load_weights(self.path)


@dataclasses.dataclass(frozen=True)
class ReconstructionObjective(Objective):
    """The objective of an autoencoder; parameters are {"autoencoder": ..., "critic": ...}.

    "critic" are those of the discriminator.
    """

    config: Config
    space: Latents
    discriminator: PatchDiscriminator
    text_encoder: None = None

    @property
    def frozen(self) -> dict[str, Lpips]:
        """Loader of LPIPS, if its file is set and its loss weight is not zero."""
        path = self.config.evaluation.lpips
        return {"lpips": Lpips(path)} if path and self.config.reconstruction.lpips else {}

    def init(self, key: jax.Array) -> dict:
        """See `Objective.init`."""
        keys = jax.random.split(key)
        side = self.config.data.resolution
        images = jnp.zeros((1, side, side, 3))
        return {
            "autoencoder": self.space.network.init(keys[0], images)["params"],
            "critic": self.discriminator.init(keys[1], images)["params"],
        }

    def draw_noise(self, key: jax.Array, batch: int, step: jax.Array | int = 0) -> dict:
        """Draw the latents' noise; also the generator loss weight, 0 before critic_start."""
        settings = self.config.reconstruction
        side = self.config.data.resolution // self.space.factor
        weight = jnp.where(step < settings.critic_start, 0.0, settings.critic)
        return {
            "latent": jax.random.normal(key, (batch, side, side, self.space.channels)),
            "critic": jnp.full((batch,), weight),
        }

    def loss(
        self, params: dict, batch: dict, noise: dict, frozen: dict | None = None
    ) -> tuple[jax.Array, dict]:
        """Sum of the losses of autoencoder and discriminator.

        Each has gradients for its own parameters only. frozen: {"lpips": parameters}, or empty to
        leave that term out.
        """
        settings, network = self.config.reconstruction, self.space.network
        variables = {"params": params["autoencoder"]}
        images = to_float(batch["image"])
        moments = network.apply(variables, images, method="encode")
        latents = network.sample(moments, noise["latent"])
        decoded = network.apply(variables, latents, method="decode")
        parts = {"l1": jnp.abs(decoded - images).mean()}
        loss = parts["l1"]
        if frozen:
            scaled = ((x + 1) * 127.5 for x in (images, decoded))
            parts["lpips"] = lpips.distance(frozen["lpips"], *scaled).mean()
            loss += settings.lpips * parts["lpips"]
        if isinstance(network, AutoencoderKL):
            # Divided by the number of image values, as the L1 distance is.
            parts["kl"] = kl_divergence(moments).sum() / images.size
            loss += settings.kl * parts["kl"]
        else:
            codes, _ = network.apply(variables, latents, method="quantize")
            parts["codebook"] = jnp.square(jax.lax.stop_gradient(latents) - codes).mean()
            commitment = jnp.square(latents - jax.lax.stop_gradient(codes)).mean()
            anchors = network.apply(variables, latents, method="anchors")
            codebook = params["autoencoder"]["codebook"]["embedding"]
            parts["anchor"] = jnp.square(codebook - jax.lax.stop_gradient(anchors)).mean()
            loss += settings.codebook * (
                parts["codebook"]
                + settings.anchor * parts["anchor"]
                + settings.commitment * commitment
            )
        generator_loss, discriminator_loss = adversarial_losses(
            self.discriminator, params["critic"], images, decoded
        )
        loss += (noise["critic"] * generator_loss).mean()
        parts["critic"] = discriminator_loss
        return loss + discriminator_loss, parts

    def forward_flops(self) -> int:
        """Count the FLOPs of encoding and decoding one image, multiply-add = 2."""
        side, network = self.config.data.resolution, self.space.network
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        params = self.shapes["autoencoder"]
        return flops.count(lambda params, x: network.apply({"params": params}, x), params, image)


def create(config: Config, vocabulary: Vocabulary) -> ReconstructionObjective:
    """Create the objective; nothing is allocated, and the vocabulary is not used."""
    dtype = jnp.dtype(config.model.dtype)
    space = Latents.create(config)
    # Widths are 64, 128, 256 for Stable Diffusion; small images have fewer levels to leave several
    # patches.
    first = max(16, space.network.size.channels[0] // 2)
    levels = max(1, min(3, config.data.resolution.bit_length() - 4))
    discriminator = PatchDiscriminator(tuple(first * 2**i for i in range(levels)), dtype)
    return ReconstructionObjective(config, space, discriminator)


def kl_divergence(moments: jax.Array) -> jax.Array:
    """KL divergence of the latents' distribution from the standard normal, nats an image: (B,)."""
    mean, std = mean_and_std(moments)
    return (0.5 * (mean**2 + std**2 - 1) - jnp.log(std)).sum((1, 2, 3))


def adversarial_losses(
    discriminator: nn.Module, params: Any, images: jax.Array, decoded: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return (generator loss (B,), hinge loss of the discriminator ()).

    The former has no gradient for the discriminator, the latter none for the images.
    """
    frozen = jax.lax.stop_gradient(params)
    generator_loss = -discriminator.apply({"params": frozen}, decoded).mean((1, 2))
    real = discriminator.apply({"params": params}, images)
    fake = discriminator.apply({"params": params}, jax.lax.stop_gradient(decoded))
    return generator_loss, (nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()) / 2
