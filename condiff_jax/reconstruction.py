"""Training of autoencoders (arXiv:2112.10752, App. G): what `system.py` is to diffusion.

Pictures are coded and decoded again; the loss is their L1 distance and LPIPS, a patch critic's
verdict, and what regularises the latents: their divergence from a standard normal distribution
(KL) or their distance to a codebook (VQ).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.metrics import lpips
from condiff_jax.models.autoencoder import Latents, to_float
from condiff_jax.models.discriminator import PatchDiscriminator
from condiff_jax.models.kl import AutoencoderKL, mean_and_std
from condiff_jax.schema import Config


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """Modules of an autoencoder's training; parameters are {"autoencoder": ..., "critic": ...}."""

    config: Config
    space: Latents
    critic: PatchDiscriminator

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters, f32."""
        keys = jax.random.split(key)
        side = self.config.data.resolution
        images = jnp.zeros((1, side, side, 3))
        return {
            "autoencoder": self.space.network.init(keys[0], images)["params"],
            "critic": self.critic.init(keys[1], images)["params"],
        }


def draw_noise(
    key: jax.Array, system: Reconstructor, batch: int, step: jax.Array
) -> dict[str, jax.Array]:
    """The latents' noise, and the weight of the critic's verdict, which begins late; B first."""
    side, settings = (
        system.config.data.resolution // system.space.factor,
        system.config.reconstruction,
    )
    weight = jnp.where(step < settings.critic_start, 0.0, settings.critic)
    return {
        "latent": jax.random.normal(key, (batch, side, side, system.space.channels)),
        "critic": jnp.full((batch,), weight),
    }


def kl_divergence(moments: jax.Array) -> jax.Array:
    """KL of the latents' distribution from the standard normal one, nats a picture: (B,)."""
    mean, std = mean_and_std(moments)
    return (0.5 * (mean**2 + std**2 - 1) - jnp.log(std)).sum((1, 2, 3))


def loss_fn(
    params: dict,
    batch: dict,
    noise: dict,
    *,
    system: Reconstructor,
    frozen: dict | None = None,
) -> tuple[jax.Array, dict]:
    """The sum of autoencoder's and critic's losses (), each with gradients for its own parameters
    alone, and the parts. frozen: LPIPS's parameters, None to do without.
    """
    settings, network = system.config.reconstruction, system.space.network
    variables = {"params": params["autoencoder"]}
    images = to_float(batch["image"])
    moments = network.apply(variables, images, method="encode")
    latents = network.sample(moments, noise["latent"])
    decoded = network.apply(variables, latents, method="decode")
    parts = {"l1": jnp.abs(decoded - images).mean()}
    loss = parts["l1"]
    if frozen is not None:
        scaled = ((x + 1) * 127.5 for x in (images, decoded))
        parts["lpips"] = lpips.distance(frozen, *scaled).mean()
        loss += settings.lpips * parts["lpips"]
    if isinstance(network, AutoencoderKL):
        # per value of the pictures, as the L1 distance is
        parts["kl"] = kl_divergence(moments).sum() / images.size
        loss += settings.kl * parts["kl"]
    else:
        codes, _ = network.apply(variables, latents, method="quantise")
        parts["codebook"] = jnp.square(jax.lax.stop_gradient(latents) - codes).mean()
        commitment = jnp.square(latents - jax.lax.stop_gradient(codes)).mean()
        loss += settings.codebook * (parts["codebook"] + settings.commitment * commitment)
    verdict, critic_loss = judge(system.critic, params["critic"], images, decoded)
    loss += (noise["critic"] * verdict).mean()
    parts["critic"] = critic_loss
    return loss + critic_loss, parts


def judge(critic: nn.Module, params: Any, images: jax.Array, decoded: jax.Array):
    """(verdict (B,), low where decoded pictures look real; the critic's hinge loss ()).

    The verdict has no gradient for the critic, the critic's loss none for the pictures.
    """
    frozen = jax.lax.stop_gradient(params)
    verdict = -critic.apply({"params": frozen}, decoded).mean((1, 2))
    real = critic.apply({"params": params}, images)
    false = critic.apply({"params": params}, jax.lax.stop_gradient(decoded))
    return verdict, (nn.relu(1 - real).mean() + nn.relu(1 + false).mean()) / 2
