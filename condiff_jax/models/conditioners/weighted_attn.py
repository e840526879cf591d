"""Ours: the class through attention to several tokens, its details only as the noise fades.

After the paper: semantics enter through attention (Sec. 2.1), and what shapes details is weighted
with gamma_c(t) as low-level control is in Eq. 1: h + coarse + gamma_c(t) details.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models import layers
from condiff_jax.models.conditioners import Conditioner

TOKENS = 4  # equal parts of the embedding: to one token every pixel would give all its attention


class ClassConditioner(Conditioner):
    """h + two projections of the attention of pixels to the class; no residual at first."""

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
        heard = layers.attention(q, k, v).reshape(b, height, columns, width)
        out = nn.Dense(2 * width, kernel_init=layers.zeros, dtype=self.dtype, name="out")(heard)
        coarse, details = jnp.split(out, 2, axis=-1)
        gamma = self.weighting(t)[:, None, None, None].astype(h.dtype)
        return h + coarse + gamma * details
