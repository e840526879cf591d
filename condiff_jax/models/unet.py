"""UNet of LDM and Stable Diffusion: ResNet blocks, and transformer blocks that hear semantics.

Semantics enter through cross-attention only; the timestep and control metadata (Eq. 1) through
the time embedding, which every ResNet block adds to its features. Without normalised queries and
keys it equals diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.control import ControlEmbed, Weighting, sinusoid
from condiff_jax.models import layers
from condiff_jax.models.layers import Attention

REMAT = {"none": lambda block: block, "block": nn.remat}  # blocks differ: no scan, no policy


@dataclasses.dataclass(frozen=True)
class Size:
    """Width of each level, which levels attend, and either the heads or the size of a head.

    context: width of the class embedding; text tokens bring their own.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    context: int
    heads: int | None = None
    head_size: int | None = None
    resnets: int = 2

    @property
    def groups(self) -> int:
        """Groups of each GroupNorm: 32 as published, fewer where that leaves under 4 channels."""
        return min(32, self.channels[0] // 4)

    def heads_at(self, width: int) -> int:
        """Number of heads of a level."""
        return self.heads or width // self.head_size


SIZES = {
    "tiny": Size((32, 64, 96), (False, True, True), 128, head_size=32, resnets=1),
    # LDM-4 on ImageNet. (Its published configuration has one head as wide as the level.)
    "class": Size((192, 384, 576, 960), (False, True, True, True), 512, head_size=32),
    # Stable Diffusion 1.5
    "text": Size((320, 640, 1280, 1280), (True, True, True, False), 768, heads=8),
}


def group_norm(groups: int, epsilon: float, name: str):
    """GroupNorm over (B, H, W, C) with scale and bias, in f32; the dtype stays."""
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=jnp.float32, name=name)
    return lambda x: norm(x).astype(x.dtype)


def layer_norm(name: str):
    """LayerNorm over channels with scale and bias, in f32; the dtype stays."""
    norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)
    return lambda x: norm(x).astype(x.dtype)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbours: (B, H, W, C) -> (B, 2 H, 2 W, C)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResNetBlock(nn.Module):
    """x (B, H, W, C), embedding (B, E) or None -> (B, H, W, width); no residual at first.

    The embedding, of the timestep and what else is given, is added to the features or, adaptive,
    modulates their second norm (`AdaGN`).
    """

    width: int
    groups: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    adaptive: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, emb: jax.Array | None = None) -> jax.Array:
        conv = partial(nn.Conv, self.width, dtype=self.dtype)
        y = nn.silu(group_norm(self.groups, self.epsilon, "norm1")(x))
        y = conv((3, 3), name="conv1")(y)
        if self.adaptive:
            norm = layers.AdaGN(self.groups, self.epsilon, self.dtype, name="norm2")
            y = norm(y, nn.silu(emb))
        else:
            if emb is not None:
                emb = nn.Dense(self.width, dtype=self.dtype, name="time")(nn.silu(emb))
                y = y + emb[:, None, None]
            y = group_norm(self.groups, self.epsilon, "norm2")(y)
        y = nn.silu(y)
        y = conv((3, 3), kernel_init=layers.zeros, name="conv2")(y)
        if x.shape[-1] != self.width:
            x = conv((1, 1), name="shortcut")(x)
        return x + y


class GatedMlp(nn.Module):
    """Linear-GEGLU-Linear with a hidden width of 4 D: (B, T, D) -> (B, T, D)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.Dense(8 * width, kernel_init=layers.xavier, dtype=self.dtype, name="fc1")(x)
        y, gate = jnp.split(y, 2, axis=-1)
        y = y * nn.gelu(gate, approximate=False)
        return nn.Dense(width, kernel_init=layers.xavier, dtype=self.dtype, name="fc2")(y)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and MLP over pixels (B, H, W, C); no residual at first.

    Queries and keys are normalised only where attention hears the condition. Without a context
    there is no cross-attention.
    """

    heads: int
    groups: int
    qk_norm: bool
    backend: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None) -> jax.Array:
        b, h, w, width = x.shape
        conv = partial(nn.Conv, width, (1, 1), dtype=self.dtype)
        attention = partial(
            Attention, self.heads, backend=self.backend, dtype=self.dtype, use_bias=False
        )
        z = conv(name="proj_in")(group_norm(self.groups, 1e-6, "norm")(x))
        z = z.reshape(b, h * w, width)
        y = layer_norm("self_norm")(z)
        z = z + attention(qk_norm=False, name="self_attention")(y)
        if context is not None:
            y = layer_norm("cross_norm")(z)
            z = z + attention(qk_norm=self.qk_norm, name="cross_attention")(y, context)
        z = z + GatedMlp(self.dtype, name="mlp")(layer_norm("mlp_norm")(z))
        return x + conv(kernel_init=layers.zeros, name="proj_out")(z.reshape(x.shape))


class UNet(nn.Module):
    """x_t (B, H, W, C), t (B,) int32, cond -> eps (B, H, W, C) f32.

    Height and width divide by 2^(levels - 1). classes: number of classes for class-conditional
    models, which attend to one token; None for text. remat: `block` stores only what goes into
    each ResNet and transformer block. adaptive: the embedding modulates norms, see `ResNetBlock`.
    """

    size: Size
    classes: int | None = None
    weighting: Weighting | None = None
    qk_norm: bool = True
    remat: str = "none"
    backend: str = "xla"
    dtype: Any = jnp.float32
    adaptive: bool = False

    padding = 1  # of the convolutions that halve the sides
    epsilon = 1e-5  # of the last norm

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, cond: Cond) -> jax.Array:
        channels, given = self.size.channels, self.given(t, cond)
        y = nn.Conv(channels[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        y, skips = self.down(y, given)
        y = self.stage("mid", 0, channels[-1], True, y, given)
        y = self.stage("mid", 1, channels[-1], False, y, given)
        y = self.up(y, skips, given)
        y = nn.silu(group_norm(self.size.groups, self.epsilon, "norm_out")(y))
        return nn.Conv(
            x.shape[-1], (3, 3), kernel_init=layers.zeros, dtype=jnp.float32, name="conv_out"
        )(y)

    def given(self, t: jax.Array, cond: Cond) -> tuple:
        """What all stages hear: (time embedding, context)."""
        return self.embed_time(t, cond), self.embed_semantics(cond)

    def sinusoids(self, t: jax.Array) -> jax.Array:
        """Timesteps (B,) as (B, channels[0])."""
        return sinusoid(t, self.size.channels[0])

    def embed_time(self, t: jax.Array, cond: Cond | None) -> jax.Array:
        """What ResNet blocks hear (B, 4 * channels[0]): the timestep, and control (Eq. 1)."""
        first = self.size.channels[0]
        emb = layers.VectorEmbed(4 * first, self.dtype, name="timestep")(self.sinusoids(t))
        if cond is not None and cond.control is not None:
            control = ControlEmbed(4 * first, self.weighting, self.dtype, name="control")
            emb = emb + control(cond.control, t, cond.drop_control)
        return emb

    def embed_semantics(self, cond: Cond) -> jax.Array:
        """What transformers hear (B, T, C): text tokens or one class token, null where dropped."""
        drop = cond.drop_semantics
        if self.classes is None:
            return layers.constrain_batch(jnp.where(drop[:, None, None], 0, cond.semantics.tokens))
        # No norm follows, so the token starts with the unit variance of text features.
        table = nn.Embed(
            self.classes + 1, self.size.context, embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype, name="class_embed",
        )  # fmt: skip
        return layers.constrain_batch(table(jnp.where(drop, self.classes, cond.semantics))[:, None])

    def stage(self, part: str, index: int, width: int, attend: bool, y: jax.Array, given: tuple):
        """A ResNet block and, to attend, a transformer block; given: (time embedding, context)."""
        size, remat, y = self.size, REMAT[self.remat], layers.constrain_batch(y)
        emb, context = given
        resnet = remat(ResNetBlock)(
            width, size.groups, dtype=self.dtype, adaptive=self.adaptive,
            name=f"{part}_resnet_{index}",
        )  # fmt: skip
        y = resnet(y, emb)
        if not attend:
            return y
        transformer = remat(TransformerBlock)(
            size.heads_at(width), size.groups, self.qk_norm, self.backend, self.dtype,
            name=f"{part}_attention_{index}",
        )  # fmt: skip
        return transformer(y, context)

    def down(self, y: jax.Array, given: tuple) -> tuple[jax.Array, list[jax.Array]]:
        """The deepest features, and those of every step on the way as skip connections."""
        skips, size = [y], self.size
        for level, (width, attend) in enumerate(zip(size.channels, size.attention, strict=True)):
            for index in range(size.resnets):
                y = self.stage(f"down_{level}", index, width, attend, y, given)
                skips.append(y)
            if level < len(size.channels) - 1:
                name = f"down_{level}_downsample"
                y = nn.Conv(width, (3, 3), 2, padding=self.padding, dtype=self.dtype, name=name)(y)
                skips.append(y)
        return y, skips

    def up(self, y: jax.Array, skips: list[jax.Array], given: tuple) -> jax.Array:
        """The features (B, H, W, channels[0]) after all skips; up_0 is the deepest level."""
        size = self.size
        levels = list(zip(size.channels, size.attention, strict=True))[::-1]
        for level, (width, attend) in enumerate(levels):
            for index in range(size.resnets + 1):
                y = jnp.concatenate([y, skips.pop()], -1)
                y = self.stage(f"up_{level}", index, width, attend, y, given)
            if level < len(levels) - 1:
                name = f"up_{level}_upsample"
                y = nn.Conv(width, (3, 3), dtype=self.dtype, name=name)(upsample(y))
                y = layers.constrain_batch(y)
        return y
