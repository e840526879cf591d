"""`cross_attn`: cross-attention of pixels to the class embedding after each ResNet block.

The embedding is a single token, so every attention weight is 1: the method learns one vector per
class and block.
"""

import flax.linen as nn
import jax

from condiff_jax.models import layers
from condiff_jax.models.conditioners import Conditioner


class ClassConditioner(Conditioner):
    """h + attention of normalized pixels to the class; the identity at initialization."""

    @nn.compact
    def __call__(
        self, h: jax.Array, class_emb: jax.Array, time_emb: jax.Array, t: jax.Array
    ) -> jax.Array:
        attention = layers.Attention(
            heads=1, dtype=self.dtype, out_init=layers.zeros, name="attention"
        )
        pixels = layers.layer_norm(h).reshape(h.shape[0], -1, h.shape[-1])  # (B, N, C)
        return h + attention(pixels, class_emb[:, None]).reshape(h.shape)
