"""Patch discriminator of autoencoder training (config field `critic`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class PatchDiscriminator(nn.Module):
    """PatchGAN (arXiv:1611.07004): images (B, H, W, 3) -> logits (B, h, w), high for real patches.

    widths: channels of the convolutions with stride 2, which one with stride 1 follows. It uses
    GroupNorm, so that the logits of an image do not depend on the rest of its batch.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = images
        for i, width in enumerate((*self.widths, 2 * self.widths[-1])):
            stride = 2 if i < len(self.widths) else 1
            conv = nn.Conv(width, (4, 4), stride, dtype=self.dtype, name=f"conv_{i}")
            x = conv(x)
            if i:
                x = nn.GroupNorm(min(32, width // 4), name=f"norm_{i}")(x)
            x = nn.leaky_relu(x, 0.2)
        return nn.Conv(1, (4, 4), dtype=jnp.float32, name="logits")(x)[..., 0]
