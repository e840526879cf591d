"""MDTv2, the masked diffusion transformer (arXiv:2303.14389), with class conditioning by AdaLN.

It has an encoder with long skips, and a decoder whose blocks all get the encoder's input as a skip.
Training adds a second pass with tokens hidden from the encoder (argument `hidden`); the
side-interpolator fills them in before the decoder. Sampling hides no tokens.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.conditioning.cond import Cond
from condiff_jax.models import layers
from condiff_jax.models.layers import Attention, Mlp, Modulation, modulate
from condiff_jax.models.transformer import Transformer

DECODER = 4  # decoder blocks of the published sizes


def hide(key: jax.Array, batch: int, tokens: int, ratio: float, spread: float = 0.2) -> jax.Array:
    """Draw the tokens to hide from the encoder, (B, N) bool.

    A random share of each sample's tokens is hidden. The share is uniform in ratio..ratio + spread
    and drawn for each sample; the published code draws one per batch.
    """
    key_share, key_order = jax.random.split(key)
    share = ratio + spread * jax.random.uniform(key_share, (batch, 1))
    visible = jnp.minimum(jnp.floor(tokens * (1 - share)), max_visible(tokens, ratio))
    order = jax.random.uniform(key_order, (batch, tokens)).argsort(1).argsort(1)
    return order >= visible


def max_visible(tokens: int, ratio: float) -> int:
    """Upper bound on the tokens that `hide` leaves visible: the encoder's static length."""
    return max(1, int(tokens * (1 - ratio)))


def relative_index(rows: int, columns: int) -> np.ndarray:
    """Bias table row of each pair of tokens, (N, N) int32 with N = rows * columns."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    down = row[:, None] - row + rows - 1
    right = column[:, None] - column + columns - 1
    return (down * (2 * columns - 1) + right).astype(np.int32)


class Block(nn.Module):
    """DiT block on x (B, K, D) whose attention has a learned relative position bias.

    A skip (B, K, D), if any, is merged into x first. index (B or 1, K, K): bias table row of each
    pair of tokens. entries: length of the table. hidden (B, K): tokens masked out of attention.
    """

    heads: int
    entries: int
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x, skip, emb, index, hidden):
        if skip is not None:
            width = x.shape[-1]
            join = nn.Dense(width, kernel_init=layers.xavier, dtype=self.dtype, name="skip")
            x = join(jnp.concatenate([x, skip], -1))
        x = layers.constrain_batch(x)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, self.dtype, name="modulation")(
            emb
        )
        y = modulate(layers.layer_norm(x), shift1, scale1)
        y = Attention(self.heads, False, self.backend, self.dtype, name="attention")(
            y, bias=self.bias(index, hidden)
        )
        x = x + gate1[:, None] * y
        y = modulate(layers.layer_norm(x), shift2, scale2)
        y = Mlp(4 * x.shape[-1], x.shape[-1], self.dtype, name="mlp")(y)
        x = x + gate2[:, None] * y
        return x, x if skip is None else None

    def bias(self, index: jax.Array, hidden: jax.Array | None) -> jax.Array:
        """Attention bias (B or 1, heads, K, K), f32."""
        init = nn.initializers.truncated_normal(0.02)
        table = self.param("relative_bias", init, (self.entries, self.heads))
        bias = jnp.moveaxis(table[index], -1, 1)
        return bias if hidden is None else jnp.where(hidden[:, None, None], -jnp.inf, bias)


class MDT(Transformer):
    """MDTv2 denoiser, see `Transformer`; `depth` excludes the side-interpolator.

    hidden (B, N) bool, optional: tokens hidden from the encoder, as drawn by `hide`: at least the
    share mask_ratio of each sample.
    """

    mask_ratio: float = 0.3

    @nn.compact
    def __call__(
        self, x: jax.Array, t: jax.Array, cond: Cond, hidden: jax.Array | None = None
    ) -> jax.Array:
        grid = (x.shape[1] // self.patch, x.shape[2] // self.patch)
        table = jnp.asarray(self.positions(x))
        positions, decoder_positions = (
            self.param(name, lambda _: table).astype(self.dtype)
            for name in ("positions", "decoder_positions")
        )
        tokens = self.patches(x) + positions  # (B, N, D)
        emb = self.time_and_control(t, cond) + self.class_embedding(cond)
        index = jnp.asarray(relative_index(*grid))[None]  # (1, N, N)
        # Initialization must create the side-interpolator's parameters too.
        if hidden is None and self.is_initializing():
            hidden = jnp.zeros(tokens.shape[:2], bool)
        if hidden is None:
            encoded = self.encode(grid, tokens, emb, index) + decoder_positions
        else:
            encoded = self.interpolate(grid, tokens, emb, index, hidden, decoder_positions)
        decoder = min(DECODER, self.depth // 2)
        blocks = self.stack(grid, decoder, nn.broadcast, "decoder_blocks")
        tokens, _ = blocks(encoded, tokens, emb, index, None)
        return self.predict(tokens, *Modulation(2, self.dtype, name="final_modulation")(emb), x)

    def block(self, grid: tuple[int, int], block=Block, name: str = ""):
        """Create a block for a grid of tokens; its bias table has BEiT's three unused rows."""
        entries = (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3
        return block(self.heads, entries, self.backend, self.dtype, name=name)

    def stack(self, grid: tuple[int, int], length: int, skip_axis, name: str):
        """Create scanned blocks; skip_axis: 0 for one skip per layer, broadcast otherwise."""
        axes = (skip_axis, nn.broadcast, nn.broadcast, nn.broadcast)
        return self.block(grid, self.scan(Block, length, axes), name)

    def encode(self, grid, x, emb, index, hidden=None) -> jax.Array:
        """Apply the encoder; the output of block i is a skip to the i-th block from the end."""
        half = max(1, (self.depth - min(DECODER, self.depth // 2)) // 2)
        x, skips = self.stack(grid, half, nn.broadcast, "in_blocks")(x, None, emb, index, hidden)
        return self.stack(grid, half, 0, "out_blocks")(x, skips[::-1], emb, index, hidden)[0]

    def interpolate(self, grid, x, emb, index, hidden, decoder_positions) -> jax.Array:
        """Encode the visible tokens and fill in the hidden ones by the side-interpolator."""
        length = max_visible(x.shape[1], self.mask_ratio)
        visible = jnp.argsort(hidden, 1, stable=True)[:, :length]  # (B, K)
        encoded = jnp.take_along_axis(x, visible[..., None], 1)
        pairs = index[0][visible[:, :, None], visible[:, None]]  # (B, K, K)
        encoded = self.encode(grid, encoded, emb, pairs, jnp.take_along_axis(hidden, visible, 1))
        token = self.param("mask_token", layers.normal, (x.shape[-1],)).astype(self.dtype)
        position = jnp.minimum(jnp.argsort(jnp.argsort(hidden, 1, stable=True), 1), length - 1)
        x = jnp.take_along_axis(encoded, position[..., None], 1)
        x = jnp.where(hidden[..., None], token, x) + decoder_positions
        filled, _ = self.block(grid, name="side_block")(x, None, emb, index, None)
        return jnp.where(hidden[..., None], filled, x)
