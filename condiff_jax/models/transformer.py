"""Base class of the diffusion transformers: embeddings, scanned blocks and output layer."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.conditioning.cond import Cond, Text
from condiff_jax.conditioning.control import ControlEmbed, Weighting
from condiff_jax.models import layers
from condiff_jax.models.layers import Mlp

# Activations stored for the backward pass: all, none of a block, or its products with weights.
REMAT = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
# name: depth, width, heads
SIZES = {
    "tiny": (4, 128, 4),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}


class Transformer(nn.Module):
    """x_t (B, H, W, C), t (B,) int32, cond -> eps (B, H, W, C) f32; subclasses define `__call__`.

    classes: number of classes for class-conditional models, None for text. base_grid: tokens per
    side at the base resolution, see `layers.position_grid`. qk_norm: RMSNorm of queries and keys
    in attention to condition tokens.
    """

    depth: int
    width: int
    heads: int
    patch: int
    base_grid: int
    classes: int | None = None
    weighting: Weighting | None = None
    qk_norm: bool = True
    position: str = "resample"
    remat: str = "none"
    unroll: int = 1
    backend: str = "xla"
    dtype: Any = jnp.float32

    def patches(self, x: jax.Array) -> jax.Array:
        """Embed the patches of x linearly, (B, N, D)."""
        embed = nn.Dense(
            self.width, kernel_init=layers.xavier, dtype=self.dtype, name="patch_embed"
        )
        return embed(layers.patchify(x, self.patch))

    def positions(self, x: jax.Array) -> np.ndarray:
        """Sin-cos embedding (N, D) of the positions of x's patches, f32."""
        rows, columns = x.shape[1] // self.patch, x.shape[2] // self.patch
        return layers.position_embedding(self.width, rows, columns, self.base_grid, self.position)

    def tokens(self, x: jax.Array) -> jax.Array:
        """Sum of the patch and position embeddings, (B, N, D)."""
        return self.patches(x) + jnp.asarray(self.positions(x), self.dtype)

    def time_and_control(self, t: jax.Array, cond: Cond) -> jax.Array:
        """Timestep embedding plus c_emb of Eq. 1, (B, D)."""
        emb = layers.TimestepEmbed(self.width, self.dtype, name="timestep")(t)
        if cond.control is not None:
            control = ControlEmbed(self.width, self.weighting, self.dtype, name="control")
            emb = emb + control(cond.control, t, cond.drop_control)
        return emb

    def class_embedding(self, cond: Cond) -> jax.Array:
        """Class embedding (B, D); the last row of the table is the null class."""
        table = nn.Embed(
            self.classes + 1, self.width, embedding_init=layers.normal, dtype=self.dtype,
            name="class_embed",
        )  # fmt: skip
        return table(jnp.where(cond.drop_semantics, self.classes, cond.semantics))

    def condition_tokens(self, cond: Cond) -> jax.Array:
        """Condition tokens (B, T, D): the class embedding, or text tokens through an MLP."""
        if self.classes is not None:
            return self.class_embedding(cond)[:, None]
        caption = Mlp(self.width, self.width, self.dtype, name="caption")
        return caption(text_or_null(cond).tokens)

    def scan(self, block: type[nn.Module], length: int, in_axes=nn.broadcast):
        """Scan `block` over `length` layers, with the configured remat and unrolling."""
        if self.remat != "none":
            policy = REMAT[self.remat]
            block = nn.remat(block, policy=policy, prevent_cse=self.unroll != 1)
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=in_axes,
            length=length,
            unroll=min(self.unroll, length),
        )

    def predict(self, tokens: jax.Array, shift: jax.Array, scale: jax.Array, like: jax.Array):
        """Modulate and project the last tokens (B, N, D) to eps with the shape of `like`."""
        tokens = layers.modulate(layers.layer_norm(tokens), shift, scale)
        out = nn.Dense(
            self.patch**2 * like.shape[-1], kernel_init=layers.zeros, dtype=jnp.float32,
            name="final",
        )(tokens)  # fmt: skip
        return layers.unpatchify(out, self.patch, *like.shape[1:3])


def text_or_null(cond: Cond) -> Text:
    """Text features, all zero where semantics are dropped."""
    text: Text = jax.tree.map(layers.constrain_batch, cond.semantics)
    return text.replace(
        tokens=jnp.where(cond.drop_semantics[:, None, None], 0, text.tokens),
        pooled=jnp.where(cond.drop_semantics[:, None], 0, text.pooled),
    )
