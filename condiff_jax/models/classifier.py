"""Classifier of noised images, for classifier guidance (arXiv:2105.05233, Sec. 4).

The timestep enters through adaptive group normalization. At high noise many images can produce the
same noised image, and the classifier predicts their average class distribution.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models import layers
from condiff_jax.models.layers import Attention
from condiff_jax.models.unet import UNet, group_norm


class AttentionPool(nn.Module):
    """Attention pooling with the mean pixel as the query: (B, H, W, C) -> (B, C)."""

    heads: int
    backend: str = "xla"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        attention = Attention(self.heads, True, self.backend, self.dtype, name="attention")
        return attention(pixels.mean(1, keepdims=True), pixels)[:, 0]


class Classifier(UNet):
    """Classifier: x_t (B, H, W, C), t (B,) int32 -> logits (B, classes) f32 of p(y | x_t, t).

    The encoder half of the UNet of the same size, without control and without cross-attention.
    """

    adaptive: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array) -> jax.Array:
        size = self.size
        conditioning = (self.embed_time(t, None), None)
        y = nn.Conv(size.channels[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        y, _ = self.down(y, conditioning)
        y = self.stage("mid", 0, size.channels[-1], True, y, conditioning)
        y = nn.silu(group_norm(size.groups, 1e-5, "norm_out")(y))
        pool = AttentionPool(
            size.heads_at(size.channels[-1]), self.backend, self.dtype, name="pool"
        )
        head = nn.Dense(self.classes, kernel_init=layers.zeros, dtype=jnp.float32, name="head")
        return head(pool(y))
