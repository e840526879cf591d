"""Autoencoders between pictures and the space diffusion works in; they own its scale and shift."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from condiff_jax.models import kl
from condiff_jax.models.kl import AutoencoderKL
from condiff_jax.models.vq import AutoencoderVQ

if TYPE_CHECKING:
    from condiff_jax.config.schema import Config

NETWORKS = {"kl": AutoencoderKL, "vq": AutoencoderVQ}


def to_float(images: jax.Array) -> jax.Array:
    """uint8 pictures as f32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array) -> jax.Array:
    """Inverse of `to_float`, clipped."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Diffusion on pixels: no autoencoder, but the same contract, (picture - shift) * scale.

    Pictures in [-1, 1] have a standard deviation near 0.5; scale 2 gives the unit variance that
    the noise schedule was made for.
    """

    scale: float = 1.0
    shift: float = 0.0
    factor: int = 1
    channels: int = 3

    def encode(self, params: dict | None, images: jax.Array, noise: jax.Array | None) -> jax.Array:
        """uint8 (B, H, W, 3) -> f32 (B, H, W, 3); there are no parameters and no noise."""
        return (to_float(images) - self.shift) * self.scale

    def decode(self, params: dict | None, x: jax.Array) -> jax.Array:
        """f32 (B, H, W, 3) -> uint8 (B, H, W, 3), clipped."""
        return to_uint8(x / self.scale + self.shift)

    @property
    def bound(self) -> float:
        """Largest |x_0|, for samplers that clip."""
        return self.scale * (1 + abs(self.shift))


@dataclasses.dataclass(frozen=True)
class Latents:
    """Diffusion on (latents - shift) * scale of a frozen autoencoder."""

    network: AutoencoderKL | AutoencoderVQ
    scale: float = 0.18215
    shift: float = 0.0
    bound = None

    @classmethod
    def create(cls, config: Config) -> Latents:
        """The space of `config.autoencoder`, kl or vq."""
        settings = config.autoencoder
        network = NETWORKS[settings.name](kl.SIZES[settings.size], jnp.dtype(config.model.dtype))
        return cls(network, settings.scale, settings.shift)

    @property
    def factor(self) -> int:
        """Sides of a picture over sides of its latents."""
        return self.network.size.factor

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.network.size.latent

    def moments(self, params: dict, images: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> what the network's `sample` takes, f32 (B, h, w, C or 2 C)."""
        return self.network.apply({"params": params}, to_float(images), method="encode")

    def sample(self, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """Moments in any type, standard normal noise (B, h, w, C) -> a sample of the latents."""
        latents = self.network.sample(jnp.asarray(moments, jnp.float32), noise)
        return (latents - self.shift) * self.scale

    def encode(self, params: dict, images: jax.Array, noise: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3), standard normal noise (B, h, w, C) -> a sample of the latents."""
        return self.sample(self.moments(params, images), noise)

    def decode(self, params: dict, x: jax.Array) -> jax.Array:
        """f32 (B, h, w, C) -> uint8 (B, H, W, 3), clipped."""
        x = x / self.scale + self.shift
        return to_uint8(self.network.apply({"params": params}, x, method="decode"))
