"""PixArt-alpha (arXiv:2310.00426): cross-attention, and one AdaLN projection for all blocks.

In "AdaLN-single" all blocks share the projection of the timestep embedding, and each block adds its
own learned table. Control (Eq. 1) is added to the timestep embedding.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Cond
from condiff_jax.models import layers
from condiff_jax.models.layers import Attention, Mlp, Modulation, modulate
from condiff_jax.models.transformer import Transformer


class Table(nn.Module):
    """AdaLN-single: adds a learned table (count, D) to the shared vectors (B, count, D)."""

    count: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, shared: jax.Array) -> list[jax.Array]:  # count times (B, D)
        width = shared.shape[-1]
        init = nn.initializers.normal(width**-0.5)
        table = self.param("table", init, (self.count, width)).astype(self.dtype)
        return list((table + shared).swapaxes(0, 1))


class Block(nn.Module):
    """PixArt block on tokens x (B, N, D), context (B, T, D) and shared modulation (B, 6, D)."""

    heads: int
    qk_norm: bool
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, modulation: jax.Array, context: jax.Array):
        x = layers.constrain_batch(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = Table(6, self.dtype, name="modulation")(
            modulation
        )
        y = modulate(layers.layer_norm(x), shift1, scale1)
        y = Attention(self.heads, False, self.backend, self.dtype, name="attention")(y)
        x = x + gate1[:, None] * y
        cross = Attention(
            self.heads, self.qk_norm, self.backend, self.dtype, layers.zeros, name="cross"
        )
        x = x + cross(x, context)  # without a norm, as published
        y = modulate(layers.layer_norm(x), shift2, scale2)
        y = Mlp(4 * x.shape[-1], x.shape[-1], self.dtype, name="mlp")(y)
        return x + gate2[:, None] * y, None


class PixArt(Transformer):
    """PixArt denoiser, see `Transformer`."""

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        tokens = self.tokens(x)  # (B, N, D)
        context = self.condition_tokens(cond)  # (B, T, D)
        emb = self.time_and_control(t, cond)
        modulation = jnp.stack(Modulation(6, self.dtype, name="shared_modulation")(emb), 1)
        stack = self.scan(Block, self.depth)
        blocks = stack(self.heads, self.qk_norm, self.backend, self.dtype, name="blocks")
        tokens, _ = blocks(tokens, modulation, context)
        shift, scale = Table(2, self.dtype, name="final_modulation")(emb[:, None])
        return self.predict(tokens, shift, scale, x)
