"""mmDiT: joint attention over image and condition tokens (SD3), and the paper's model.

In `ours`, semantics enter only through attention and control metadata (Eq. 1) only through AdaLN.
`mmdit` also adds the pooled text or the class to the AdaLN input.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Cond
from condiff_jax.models import layers
from condiff_jax.models.layers import HeadMerge, HeadProjection, Mlp, Modulation, modulate
from condiff_jax.models.transformer import Transformer, text_or_null

STREAMS = ("shared", "qkv", "full")


class Block(nn.Module):
    """DiT block over the joint sequence z (B, N + T, D) of N image and T condition tokens.

    All parameters are shared between image and condition tokens, except that with `streams="qkv"`
    condition tokens have their own projections to queries, keys and values.
    """

    heads: int
    tokens: int  # N
    streams: str
    qk_norm: bool
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, z: jax.Array, emb: jax.Array) -> tuple[jax.Array, None]:
        z = layers.constrain_batch(z)
        shift1, scale1, gate1, shift2, scale2, gate2 = Modulation(6, self.dtype, name="modulation")(
            emb
        )
        y = modulate(layers.layer_norm(z), shift1, scale1)
        q, k, v = self.queries_keys_values(y)
        y = HeadMerge(self.dtype, name="out")(layers.attention(q, k, v, self.backend))
        z = z + gate1[:, None] * y
        y = modulate(layers.layer_norm(z), shift2, scale2)
        y = Mlp(4 * z.shape[-1], z.shape[-1], self.dtype, name="mlp")(y)
        return z + gate2[:, None] * y, None

    def queries_keys_values(self, y: jax.Array) -> list[jax.Array]:
        """Project to queries, keys and values, each (B, N + T, heads, head size)."""
        project = partial(HeadProjection, self.heads, dtype=self.dtype)
        norm = partial(layers.rms_norm, self.qk_norm)
        parts = {"": y}
        if self.streams == "qkv":
            parts = {"": y[:, : self.tokens], "context_": y[:, self.tokens :]}
        qkv = []
        for prefix, part in parts.items():
            # Table A1's parameter count excludes biases of the condition's projections.
            bias = not prefix
            q = norm(prefix + "query_norm")(project(bias, name=prefix + "query")(part))
            k = norm(prefix + "key_norm")(project(bias, name=prefix + "key")(part))
            qkv.append((q, k, project(bias, name=prefix + "value")(part)))
        return [jnp.concatenate(part, axis=1) for part in zip(*qkv, strict=True)]


class TwoStreamBlock(nn.Module):
    """SD3 block: image x (B, N, D) and context c (B, T, D) share attention and no parameters.

    last: the context is not updated, as its output would not be used; its queries have no effect.
    """

    heads: int
    qk_norm: bool
    backend: str
    dtype: Any
    last: bool = False

    @nn.compact
    def __call__(self, xc: tuple[jax.Array, jax.Array], emb: jax.Array):
        x, c = map(layers.constrain_batch, xc)
        mod_x = Modulation(6, self.dtype, name="modulation")(emb)
        mod_c = Modulation(2 if self.last else 6, self.dtype, name="context_modulation")(emb)
        qkv = [
            jnp.concatenate(part, 1)
            for part in zip(
                self.queries_keys_values("", modulate(layers.layer_norm(x), *mod_x[:2])),
                self.queries_keys_values("context_", modulate(layers.layer_norm(c), *mod_c[:2])),
                strict=True,
            )
        ]
        y = layers.attention(*qkv, self.backend)
        x = self.update("", x, y[:, : x.shape[1]], mod_x[2:])
        if not self.last:
            c = self.update("context_", c, y[:, x.shape[1] :], mod_c[2:])
        return (x, c), None

    def queries_keys_values(self, prefix: str, y: jax.Array) -> tuple[jax.Array, ...]:
        """Project one stream to queries, keys and values, each (B, T, heads, head size)."""
        project = partial(HeadProjection, self.heads, dtype=self.dtype)
        norm = partial(layers.rms_norm, self.qk_norm)
        q = norm(prefix + "query_norm")(project(name=prefix + "query")(y))
        k = norm(prefix + "key_norm")(project(name=prefix + "key")(y))
        return q, k, project(name=prefix + "value")(y)

    def update(self, prefix: str, x: jax.Array, attended: jax.Array, mod: list) -> jax.Array:
        """Add the gated attention output and the gated MLP to one stream."""
        gate1, shift2, scale2, gate2 = mod
        x = x + gate1[:, None] * HeadMerge(self.dtype, name=prefix + "out")(attended)
        y = modulate(layers.layer_norm(x), shift2, scale2)
        y = Mlp(4 * x.shape[-1], x.shape[-1], self.dtype, name=prefix + "mlp")(y)
        return x + gate2[:, None] * y


class MMDiT(Transformer):
    """mmDiT denoiser: x_t (B, H, W, C), t (B,) int32, cond -> eps (B, H, W, C) f32.

    streams: `shared` (the paper's class-conditional size), `qkv` (its text size) or `full` (SD3).
    pooled: also add the pooled text or the class to the AdaLN input (SD3; not the paper's model).
    """

    streams: str = "qkv"
    pooled: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        image = self.tokens(x)  # (B, N, D)
        context, pooled = self.embed_semantics(cond)  # (B, T, D), (B, D)
        emb = self.time_and_control(t, cond)
        if self.pooled:
            emb = emb + pooled
        image = self.blocks(image, context, emb)
        return self.predict(image, *Modulation(2, self.dtype, name="final_modulation")(emb), x)

    def embed_semantics(self, cond: Cond) -> tuple[jax.Array, jax.Array | None]:
        """Condition tokens (B, T, D) and the AdaLN vector (B, D), null where dropped."""
        if self.classes is not None:
            emb = self.class_embedding(cond)
            return emb[:, None], emb
        text = text_or_null(cond)
        if self.streams == "full":
            caption = nn.Dense(
                self.width, kernel_init=layers.xavier, dtype=self.dtype, name="caption"
            )
            pool = layers.VectorEmbed(self.width, self.dtype, name="pooled")
        else:
            # The paper's parameter count implies one MLP for tokens and pooled text.
            caption = pool = Mlp(self.width, self.width, self.dtype, name="caption")
            if self.pooled and text.pooled.shape[-1] != text.tokens.shape[-1]:
                raise ValueError(
                    f"pooled text has {text.pooled.shape[-1]} channels, its tokens "
                    f"{text.tokens.shape[-1]}: mmdit needs equal widths, or model.streams=full"
                )
        return caption(text.tokens), pool(text.pooled) if self.pooled else None

    def blocks(self, image: jax.Array, context: jax.Array, emb: jax.Array) -> jax.Array:
        """Apply all blocks to the image tokens (B, N, D); parameters are stacked by layer."""
        common = {"qk_norm": self.qk_norm, "backend": self.backend, "dtype": self.dtype}
        n = image.shape[1]
        if self.streams == "full":
            stack = self.scan(TwoStreamBlock, self.depth - 1)
            xc, _ = stack(self.heads, **common, name="blocks")((image, context), emb)
            last = TwoStreamBlock(self.heads, **common, last=True, name="last_block")
            return last(xc, emb)[0][0]
        stack = self.scan(Block, self.depth)(self.heads, n, self.streams, **common, name="blocks")
        z, _ = stack(jnp.concatenate([image, context], 1), emb)
        return z[:, :n]
