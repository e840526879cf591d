"""`adanorm`: AdaLN-zero of the class after each ResNet block, as in DiT."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models import layers
from condiff_jax.models.conditioners import Conditioner


class ClassConditioner(Conditioner):
    """h + gate * (LayerNorm(h) * (1 + scale) + shift); the gate is zero at initialization."""

    @nn.compact
    def __call__(
        self, h: jax.Array, class_emb: jax.Array, time_emb: jax.Array, t: jax.Array
    ) -> jax.Array:
        project = nn.Dense(
            3 * h.shape[-1], kernel_init=layers.zeros, dtype=self.dtype, name="modulation"
        )
        scale, shift, gate = jnp.split(project(nn.silu(class_emb))[:, None, None], 3, axis=-1)
        return h + gate * (layers.layer_norm(h) * (1 + scale) + shift)
