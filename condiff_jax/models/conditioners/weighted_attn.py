"""`weighted_attn`: our method, cross-attention to several class tokens with gamma_c weighting.

It follows the paper: semantics enter through attention (Sec. 2.1), and the part that shapes details
is weighted by gamma_c(t) like low-level control in Eq. 1: h + coarse + gamma_c(t) details.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models import layers
from condiff_jax.models.conditioners import Conditioner

# The embedding is split into equal parts: with a single token every attention weight would be 1.
TOKENS = 4


class ClassConditioner(Conditioner):
    """h + two projections of the pixels' attention to the class; identity at initialization."""

    @nn.compact
    def __call__(
        self, h: jax.Array, class_emb: jax.Array, time_emb: jax.Array, t: jax.Array
    ) -> jax.Array:
        b, height, columns, width = h.shape
        pixels = layers.layer_norm(h).reshape(b, -1, width)  # (B, N, C)
        tokens = class_emb.reshape(b, TOKENS, -1)

        def project(name, x):
            return layers.HeadProjection(1, dtype=self.dtype, width=width, name=name)(x)

        q, k, v = project("query", pixels), project("key", tokens), project("value", tokens)
        attended = layers.attention(q, k, v).reshape(b, height, columns, width)
        out = nn.Dense(2 * width, kernel_init=layers.zeros, dtype=self.dtype, name="out")(attended)
        coarse, details = jnp.split(out, 2, axis=-1)
        gamma = self.weighting(t)[:, None, None, None].astype(h.dtype)
        return h + coarse + gamma * details
