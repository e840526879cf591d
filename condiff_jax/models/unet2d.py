"""UNet of DDPM for classes, in pixels: ResNet blocks, and attention of pixels to each other.

The network of google/ddpm-cifar10-32 and, without class and control, equal to diffusers'
UNet2DModel. How it hears the class is up to a method of the package `conditioners`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.control import sinusoid
from condiff_jax.models import conditioners, kl, layers
from condiff_jax.models.unet import REMAT, ResNetBlock, UNet


@dataclasses.dataclass(frozen=True)
class Size:
    """Width of each level, which levels attend, ResNet blocks of one, groups of a GroupNorm."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...] = (False, True, False, False)
    resnets: int = 2
    groups: int = 32


SIZES = {
    # The published ones at a quarter of their width, with one block a level
    "tiny": Size((16, 32, 32, 32), resnets=1, groups=8),
    "tiny2": Size((32, 64, 64, 64), resnets=1, groups=16),
    "tiny4": Size((64, 128, 128, 128), resnets=1),
    "small": Size((64, 128, 128, 128)),
    "medium": Size((128, 256, 256, 256)),
    "large": Size((256, 512, 512, 512)),
}


class Prepare(nn.Module):
    """A module that holds the layers, if any, of a method's prepare_conditioning."""

    function: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
        return self.function(time_emb, class_emb)


class UNet2D(UNet):
    """x_t (B, H, W, C), t (B,) int32, cond with a class -> eps (B, H, W, C) f32.

    Fields as of `UNet`, but qk_norm: the attention is plain, with one head. conditioner: a method
    of the package `conditioners`.
    """

    conditioner: str = "film"

    # Those of diffusers' downsample_padding=0 and norm_eps=1e-6
    padding = ((0, 1), (0, 1))
    epsilon = kl.EPSILON

    def given(self, t: jax.Array, cond: Cond) -> tuple:
        """(what ResNet blocks hear, (class, time, t) for what comes after each)."""
        time_emb = self.embed_time(t, cond)
        table = nn.Embed(
            self.classes + 1, time_emb.shape[-1], embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype, name="class_embed",
        )  # fmt: skip
        # The last row is the null condition.
        class_emb = table(jnp.where(cond.drop_semantics, self.classes, cond.semantics))
        class_emb = layers.constrain_batch(class_emb)
        prepare, _ = conditioners.load(self.conditioner)
        heard = Prepare(prepare, name="class_prepare")(time_emb, class_emb)
        return heard, (class_emb, time_emb, t)

    def sinusoids(self, t: jax.Array) -> jax.Array:
        """(B, channels[0]): sines, then cosines, the last of them with a period of 2 pi 10^4."""
        first = self.size.channels[0]
        return jnp.roll(sinusoid(t, first, last=True), first // 2, axis=-1)

    def stage(self, part: str, index: int, width: int, attend: bool, y: jax.Array, given: tuple):
        """A ResNet block, the conditioner and, to attend, self-attention; given: as of `given`."""
        size, remat, y = self.size, REMAT[self.remat], layers.constrain_batch(y)
        emb, others = given
        resnet = remat(ResNetBlock)
        name = f"{part}_resnet_{index}"
        y = resnet(width, size.groups, self.epsilon, self.dtype, name=name)(y, emb)
        _, conditioner = conditioners.load(self.conditioner)
        name = f"{part}_class_{index}"
        y = remat(conditioner)(size.groups, self.weighting, self.dtype, name=name)(y, *others)
        if not attend:
            return y
        name = f"{part}_attention_{index}"
        return remat(kl.SelfAttention)(size.groups, self.dtype, self.backend, name=name)(y)
