"""Mappings between images and the diffusion space, including its scale and shift."""

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
    """Convert uint8 images to f32 in [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1


def to_uint8(x: jax.Array) -> jax.Array:
    """Invert `to_float`, with clipping."""
    return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Pixel space, without an autoencoder: (image - shift) * scale.

    Images in [-1, 1] have a standard deviation near 0.5; scale 2 gives the unit variance that
    noise schedules assume.
    """

    scale: float = 1.0
    shift: float = 0.0
    factor: int = 1
    channels: int = 3

    def encode(self, params: dict | None, images: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Encode uint8 (B, H, W, 3) to f32 (B, H, W, 3); params and noise are not used."""
        return (to_float(images) - self.shift) * self.scale

    def decode(self, params: dict | None, x: jax.Array) -> jax.Array:
        """Decode f32 (B, H, W, 3) to uint8 (B, H, W, 3), with clipping."""
        return to_uint8(x / self.scale + self.shift)

    @property
    def bound(self) -> float:
        """Largest |x_0|, for samplers that clip."""
        return self.scale * (1 + abs(self.shift))


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latent space of a frozen autoencoder: (latents - shift) * scale."""

    network: AutoencoderKL | AutoencoderVQ
    scale: float = 0.18215
    shift: float = 0.0
    bound = None

    @classmethod
    def create(cls, config: Config) -> Latents:
        """Create the latent space of `config.autoencoder`, kl or vq."""
        settings = config.autoencoder
        network = NETWORKS[settings.name](kl.SIZES[settings.size], jnp.dtype(config.model.dtype))
        return cls(network, settings.scale, settings.shift)

    @property
    def factor(self) -> int:
        """Downsampling factor: the sides of an image over the sides of its latents."""
        return self.network.size.factor

    @property
    def channels(self) -> int:
        """Number of channels of the latents."""
        return self.network.size.latent

    def moments(self, params: dict, images: jax.Array) -> jax.Array:
        """Encode uint8 (B, H, W, 3) to the input of `sample`, f32 (B, h, w, C or 2 C)."""
        return self.network.apply({"params": params}, to_float(images), method="encode")

    def sample(self, moments: jax.Array, noise: jax.Array) -> jax.Array:
        """Sample latents from moments of any dtype with standard normal noise (B, h, w, C)."""
        latents = self.network.sample(jnp.asarray(moments, jnp.float32), noise)
        return (latents - self.shift) * self.scale

    def encode(self, params: dict, images: jax.Array, noise: jax.Array) -> jax.Array:
        """Sample latents of uint8 (B, H, W, 3) with standard normal noise (B, h, w, C)."""
        return self.sample(self.moments(params, images), noise)

    def decode(self, params: dict, x: jax.Array) -> jax.Array:
        """Decode f32 (B, h, w, C) to uint8 (B, H, W, 3), with clipping."""
        x = x / self.scale + self.shift
        return to_uint8(self.network.apply({"params": params}, x, method="decode"))
