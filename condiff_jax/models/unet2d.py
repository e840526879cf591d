"""Class-conditional UNet of DDPM, in pixel space: ResNet blocks and self-attention.

The network of google/ddpm-cifar10-32; without class and control it equals diffusers' UNet2DModel.
A method of the package `conditioners` defines the class conditioning.
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
    """UNet size: channels and attention of each level, ResNet blocks per level, norm groups."""

    channels: tuple[int, ...]
    attention: tuple[bool, ...] = (False, True, False, False)
    resnets: int = 2
    groups: int = 32


SIZES = {
    # small, medium and large at a quarter of their width, with one ResNet block a level.
    "tiny": Size((16, 32, 32, 32), resnets=1, groups=8),
    "tiny2": Size((32, 64, 64, 64), resnets=1, groups=16),
    "tiny4": Size((64, 128, 128, 128), resnets=1),
    "small": Size((64, 128, 128, 128)),
    "medium": Size((128, 256, 256, 256)),
    "large": Size((256, 512, 512, 512)),
}


class Prepare(nn.Module):
    """Wrap a method's prepare_conditioning in a module, which holds its layers, if any."""

    function: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
        return self.function(time_emb, class_emb)


class UNet2D(UNet):
    """UNet denoiser: x_t (B, H, W, C), t (B,) int32, cond with a class -> eps (B, H, W, C) f32.

    Fields are those of `UNet`, but qk_norm has no effect: self-attention is plain, with one head.
    conditioner: a method of the package `conditioners`.
    """

    conditioner: str = "film"

    # These correspond to diffusers' downsample_padding=0 and norm_eps=1e-6.
    padding = ((0, 1), (0, 1))
    epsilon = kl.EPSILON

    def conditioning(self, t: jax.Array, cond: Cond) -> tuple:
        """(embedding for ResNet blocks, (class_emb, time_emb, t) for the conditioners)."""
        time_emb = self.embed_time(t, cond)
        table = nn.Embed(
            self.classes + 1, time_emb.shape[-1], embedding_init=nn.initializers.normal(1.0),
            dtype=self.dtype, name="class_embed",
        )  # fmt: skip
        # The last row of the table is the null condition.
        class_emb = table(jnp.where(cond.drop_semantics, self.classes, cond.semantics))
        class_emb = layers.constrain_batch(class_emb)
        prepare, _ = conditioners.load(self.conditioner)
        block_emb = Prepare(prepare, name="class_prepare")(time_emb, class_emb)
        return block_emb, (class_emb, time_emb, t)

    def sinusoids(self, t: jax.Array) -> jax.Array:
        """Sines, then cosines (B, channels[0]); the longest period is 2 pi 10^4."""
        width = self.size.channels[0]
        return jnp.roll(sinusoid(t, width, last=True), width // 2, axis=-1)

    def stage(
        self, part: str, index: int, width: int, attend: bool, y: jax.Array, conditioning: tuple
    ) -> jax.Array:
        """Apply a ResNet block, the conditioner and, if `attend`, self-attention."""
        size = self.size
        remat = REMAT[self.remat]
        emb, class_inputs = conditioning
        y = layers.constrain_batch(y)
        resnet = remat(ResNetBlock)
        name = f"{part}_resnet_{index}"
        y = resnet(width, size.groups, self.epsilon, self.dtype, name=name)(y, emb)
        _, conditioner = conditioners.load(self.conditioner)
        name = f"{part}_class_{index}"
        y = remat(conditioner)(size.groups, self.weighting, self.dtype, name=name)(y, *class_inputs)
        if not attend:
            return y
        name = f"{part}_attention_{index}"
        return remat(kl.SelfAttention)(size.groups, self.dtype, self.backend, name=name)(y)
