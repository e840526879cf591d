"""AutoencoderKL: the network of Stable Diffusion's autoencoder, equal to diffusers' class.

The scale and shift of the latents are in `autoencoder.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models import layers
from condiff_jax.models.layers import HeadMerge, HeadProjection
from condiff_jax.models.unet import ResNetBlock, group_norm, upsample

EPSILON = 1e-6  # epsilon of every GroupNorm


@dataclasses.dataclass(frozen=True)
class Size:
    """Autoencoder size: channels of each level, of which all but the last halve the sides.

    latent: channels of the latents. codes: codebook size of a VQ autoencoder (vq.py).
    """

    channels: tuple[int, ...]
    latent: int = 4
    resnets: int = 2
    codes: int = 16384

    @property
    def groups(self) -> int:
        """Groups of each GroupNorm: 32 as published, or fewer for at least 4 channels in each."""
        return min(32, self.channels[0] // 4)

    @property
    def factor(self) -> int:
        """Downsampling factor: the sides of an image over the sides of its latents."""
        return 2 ** (len(self.channels) - 1)


SIZES = {"tiny": Size((16, 32, 32), resnets=1, codes=1024), "sd": Size((128, 256, 512, 512))}


class SelfAttention(nn.Module):
    """Residual single-head self-attention over the pixels of (B, H, W, C)."""

    groups: int
    dtype: Any
    backend: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = group_norm(self.groups, EPSILON, "norm")(x)
        y = y.reshape(x.shape[0], -1, x.shape[-1])  # (B, N, C)
        q, k, v = (
            HeadProjection(1, dtype=self.dtype, name=name)(y) for name in ("query", "key", "value")
        )
        y = HeadMerge(self.dtype, name="out")(layers.attention(q, k, v, self.backend))
        return x + y.reshape(x.shape)


class Encoder(nn.Module):
    """Encoder: images (B, H, W, 3) -> (B, h, w, channels)."""

    size: Size
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.size
        last = len(size.channels) - 1
        y = nn.Conv(size.channels[0], (3, 3), dtype=self.dtype, name="conv_in")(images)
        for level, width in enumerate(size.channels):
            for index in range(size.resnets):
                y = resnet(size, width, self.dtype, f"down_{level}_resnet_{index}")(y)
            if level < last:
                y = nn.Conv(
                    width, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype,
                    name=f"down_{level}_downsample",
                )(y)  # fmt: skip
        return head(size, self.channels, mid(size, self.dtype, y))


class Decoder(nn.Module):
    """Decoder: (B, h, w, latent) -> images (B, H, W, 3)."""

    size: Size
    dtype: Any

    @nn.compact
    def __call__(self, latents: jax.Array) -> jax.Array:
        size = self.size
        last = len(size.channels) - 1
        y = nn.Conv(size.channels[-1], (3, 3), dtype=self.dtype, name="conv_in")(latents)
        y = mid(size, self.dtype, y)
        for level, width in enumerate(size.channels[::-1]):  # up_0 is the deepest level
            for index in range(size.resnets + 1):
                y = resnet(size, width, self.dtype, f"up_{level}_resnet_{index}")(y)
            if level < last:
                name = f"up_{level}_upsample"
                y = nn.Conv(width, (3, 3), dtype=self.dtype, name=name)(upsample(y))
                y = layers.constrain_batch(y)
        return head(size, 3, y)


def resnet(size: Size, width: int, dtype: Any, name: str) -> ResNetBlock:
    """Create a ResNet block without time embedding."""
    return ResNetBlock(width, size.groups, EPSILON, dtype, name=name)


def mid(size: Size, dtype: Any, y: jax.Array) -> jax.Array:
    """Apply the deepest blocks of encoder and decoder, (B, h, w, C) -> (B, h, w, C)."""
    width = size.channels[-1]
    y = resnet(size, width, dtype, "mid_resnet_0")(y)
    y = SelfAttention(size.groups, dtype, name="mid_attention")(y)
    return resnet(size, width, dtype, "mid_resnet_1")(y)


def head(size: Size, channels: int, y: jax.Array) -> jax.Array:
    """Apply the last norm and convolution of encoder and decoder; the output is f32."""
    y = nn.silu(group_norm(size.groups, EPSILON, "norm_out")(y))
    return nn.Conv(channels, (3, 3), dtype=jnp.float32, name="conv_out")(y)


class AutoencoderKL(nn.Module):
    """Autoencoder between images (B, H, W, 3) in [-1, 1] and latents (B, h, w, latent), f32."""

    size: Size
    dtype: Any = jnp.float32

    def setup(self):
        self.encoder = Encoder(self.size, 2 * self.size.latent, self.dtype)
        self.decoder = Decoder(self.size, self.dtype)
        self.quant_conv = nn.Conv(2 * self.size.latent, (1, 1))
        self.post_quant_conv = nn.Conv(self.size.latent, (1, 1))

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruct images (B, H, W, 3) from their mean latents; initializes all parameters."""
        return self.decode(self.sample(self.encode(images), None))

    def encode(self, images: jax.Array) -> jax.Array:
        """Encode to the moments (B, h, w, 2 * latent) of the latents, see `mean_and_std`."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode to images (B, H, W, 3), near [-1, 1] but not clipped."""
        return self.decoder(self.post_quant_conv(latents))

    @staticmethod
    def sample(moments: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Sample latents (B, h, w, latent) with standard normal noise; without noise, the mean."""
        mean, std = mean_and_std(moments)
        return mean if noise is None else mean + std * noise


def mean_and_std(moments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Split moments into mean and standard deviation; log-variance is clipped to [-30, 20]."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(jnp.clip(log_variance, -30, 20) / 2)
