"""DiT with class conditioning by AdaLN, or class or text conditioning by cross-attention.

`dit_ln` is DiT (arXiv:2212.09748): the class embedding is added to the timestep embedding.
`dit_att` uses AdaLN for timestep and control, and cross-attention to the class token or the text
tokens in every block.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax

from condiff_jax.conditioning.cond import Cond
from condiff_jax.models import layers
from condiff_jax.models.layers import Attention, Mlp, Modulation, modulate
from condiff_jax.models.transformer import Transformer


class Block(nn.Module):
    """DiT block on tokens x (B, N, D) with AdaLN-zero from emb (B, D).

    With a context (B, T, D), cross-attention comes between self-attention and MLP; its output is
    zero at initialization.
    """

    heads: int
    qk_norm: bool
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array, context: jax.Array | None):
        x = layers.constrain_batch(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, self.dtype, name="modulation")(
            emb
        )
        y = modulate(layers.layer_norm(x), shift1, scale1)
        y = Attention(self.heads, False, self.backend, self.dtype, name="attention")(y)
        x = x + gate1[:, None] * y
        if context is not None:
            cross = Attention(
                self.heads, self.qk_norm, self.backend, self.dtype, layers.zeros, name="cross"
            )
            x = x + cross(layers.layer_norm(x), context)
        y = modulate(layers.layer_norm(x), shift2, scale2)
        y = Mlp(4 * x.shape[-1], x.shape[-1], self.dtype, name="mlp")(y)
        return x + gate2[:, None] * y, None


class DiT(Transformer):
    """DiT denoiser, see `Transformer`; cross: cross-attention to semantics instead of AdaLN."""

    cross: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        tokens = self.tokens(x)  # (B, N, D)
        emb = self.time_and_control(t, cond)
        context = None
        if self.cross:
            context = self.condition_tokens(cond)  # (B, T, D)
        else:
            emb = emb + self.class_embedding(cond)
        stack = self.scan(Block, self.depth)
        blocks = stack(self.heads, self.qk_norm, self.backend, self.dtype, name="blocks")
        tokens, _ = blocks(tokens, emb, context)
        return self.predict(tokens, *Modulation(2, self.dtype, name="final_modulation")(emb), x)
