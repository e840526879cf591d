"""UNet of LDM and Stable Diffusion: ResNet blocks, and transformer blocks with cross-attention.

Semantics enter through cross-attention only. The timestep and control metadata (Eq. 1) enter
through the time embedding, which every ResNet block adds to its features. Without qk_norm it equals
diffusers' UNet2DConditionModel.
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

# Blocks differ in shape, so they are not scanned, and remat has no policy.
REMAT = {"none": lambda block: block, "block": nn.remat}


@dataclasses.dataclass(frozen=True)
class Size:
    """UNet size: channels and attention of each level, and either `heads` or `head_size`.

    context: width of the class embedding; text tokens have the width of their encoder.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    context: int
    heads: int | None = None
    head_size: int | None = None
    resnets: int = 2

    @property
    def groups(self) -> int:
        """Groups of each GroupNorm: 32 as published, or fewer for at least 4 channels in each."""
        return min(32, self.channels[0] // 4)

    def heads_at(self, width: int) -> int:
        """Number of attention heads of a level with `width` channels."""
        return self.heads or width // self.head_size


SIZES = {
    "tiny": Size((32, 64, 96), (False, True, True), 128, head_size=32, resnets=1),
    # LDM-4 on ImageNet; its published configuration has one head as wide as the level.
    "class": Size((192, 384, 576, 960), (False, True, True, True), 512, head_size=32),
    # Stable Diffusion 1.5
    "text": Size((320, 640, 1280, 1280), (True, True, True, False), 768, heads=8),
}


def group_norm(groups: int, epsilon: float, name: str):
    """Return a GroupNorm with scale and bias, computed in f32, that preserves the dtype."""
    norm = nn.GroupNorm(groups, epsilon=epsilon, dtype=jnp.float32, name=name)
    return lambda x: norm(x).astype(x.dtype)


def layer_norm(name: str):
    """Return a LayerNorm with scale and bias, computed in f32, that preserves the dtype."""
    norm = nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, name=name)
    return lambda x: norm(x).astype(x.dtype)


def upsample(x: jax.Array) -> jax.Array:
    """Nearest-neighbor upsampling: (B, H, W, C) -> (B, 2 H, 2 W, C)."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class ResNetBlock(nn.Module):
    """ResNet block: x (B, H, W, C), embedding (B, E) or None -> (B, H, W, width).

    The embedding is added to the features or, if adaptive, modulates their second norm (`AdaGN`).
    The residual branch is zero at initialization.
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
    """GEGLU MLP with a hidden width of 4 D: (B, T, D) -> (B, T, D)."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.Dense(8 * width, kernel_init=layers.xavier, dtype=self.dtype, name="fc1")(x)
        y, gate = jnp.split(y, 2, axis=-1)
        y = y * nn.gelu(gate, approximate=False)
        return nn.Dense(width, kernel_init=layers.xavier, dtype=self.dtype, name="fc2")(y)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and MLP over pixels (B, H, W, C).

    qk_norm: normalize queries and keys of cross-attention. Without a context there is no
    cross-attention. The residual branch is zero at initialization.
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
    """UNet denoiser: x_t (B, H, W, C), t (B,) int32, cond -> eps (B, H, W, C) f32.

    2^(levels - 1) must divide height and width. classes: number of classes for class-conditional
    models, which attend to one token; None for text. remat: `block` stores only the inputs of each
    ResNet and transformer block. adaptive: the embedding modulates norms, see `ResNetBlock`.
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
        channels = self.size.channels
        conditioning = self.conditioning(t, cond)
        y = nn.Conv(channels[0], (3, 3), dtype=self.dtype, name="conv_in")(x)
        y, skips = self.down(y, conditioning)
        y = self.stage("mid", 0, channels[-1], True, y, conditioning)
        y = self.stage("mid", 1, channels[-1], False, y, conditioning)
        y = self.up(y, skips, conditioning)
        y = nn.silu(group_norm(self.size.groups, self.epsilon, "norm_out")(y))
        return nn.Conv(
            x.shape[-1], (3, 3), kernel_init=layers.zeros, dtype=jnp.float32, name="conv_out"
        )(y)

    def conditioning(self, t: jax.Array, cond: Cond) -> tuple:
        """Conditioning inputs of all stages: (time embedding, context)."""
        return self.embed_time(t, cond), self.embed_semantics(cond)

    def sinusoids(self, t: jax.Array) -> jax.Array:
        """Sinusoidal features (B, channels[0]) of timesteps (B,)."""
        return sinusoid(t, self.size.channels[0])

    def embed_time(self, t: jax.Array, cond: Cond | None) -> jax.Array:
        """Embedding of the timestep and of control (Eq. 1), (B, 4 * channels[0])."""
        width = 4 * self.size.channels[0]
        emb = layers.VectorEmbed(width, self.dtype, name="timestep")(self.sinusoids(t))
        if cond is not None and cond.control is not None:
            control = ControlEmbed(width, self.weighting, self.dtype, name="control")
            emb = emb + control(cond.control, t, cond.drop_control)
        return emb

    def embed_semantics(self, cond: Cond) -> jax.Array:
        """Context (B, T, C): text tokens or one class token, null where dropped."""
        drop = cond.drop_semantics
        if self.classes is None:
            return layers.constrain_batch(jnp.where(drop[:, None, None], 0, cond.semantics.tokens))
        # The token has the unit variance of text features at initialization, as no norm follows.
        table = nn.Embed(
            self.classes + 1, self.size.context, embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype, name="class_embed",
        )  # fmt: skip
        return layers.constrain_batch(table(jnp.where(drop, self.classes, cond.semantics))[:, None])

    def stage(
        self, part: str, index: int, width: int, attend: bool, y: jax.Array, conditioning: tuple
    ) -> jax.Array:
        """Apply a ResNet block and, if `attend`, a transformer block."""
        size = self.size
        remat = REMAT[self.remat]
        emb, context = conditioning
        y = layers.constrain_batch(y)
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

    def down(self, y: jax.Array, conditioning: tuple) -> tuple[jax.Array, list[jax.Array]]:
        """Return the deepest features, and those of every step as skip connections."""
        size = self.size
        skips = [y]
        for level, (width, attend) in enumerate(zip(size.channels, size.attention, strict=True)):
            for index in range(size.resnets):
                y = self.stage(f"down_{level}", index, width, attend, y, conditioning)
                skips.append(y)
            if level < len(size.channels) - 1:
                name = f"down_{level}_downsample"
                y = nn.Conv(width, (3, 3), 2, padding=self.padding, dtype=self.dtype, name=name)(y)
                skips.append(y)
        return y, skips

    def up(self, y: jax.Array, skips: list[jax.Array], conditioning: tuple) -> jax.Array:
        """Return features (B, H, W, channels[0]) after all skips; up_0 is the deepest level."""
        size = self.size
        levels = list(zip(size.channels, size.attention, strict=True))[::-1]
        for level, (width, attend) in enumerate(levels):
            for index in range(size.resnets + 1):
                y = jnp.concatenate([y, skips.pop()], -1)
                y = self.stage(f"up_{level}", index, width, attend, y, conditioning)
            if level < len(levels) - 1:
                name = f"up_{level}_upsample"
                y = nn.Conv(width, (3, 3), dtype=self.dtype, name=name)(upsample(y))
                y = layers.constrain_batch(y)
        return y
