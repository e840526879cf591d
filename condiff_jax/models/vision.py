"""Frozen backbones of LPIPS: the convolutions of AlexNet and of VGG16.

FID's network is in inception.py, CLIP's image tower in clip.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax

# Width, kernel and stride of AlexNet's convolutions, and whether a max pool comes before
# (arXiv:1404.5997, without its normalisation layers).
ALEXNET = ((64, 11, 4, False), (192, 5, 1, True), (384, 3, 1, True), (256, 3, 1, False))
ALEXNET += ((256, 3, 1, False),)
# Widths of the stages of VGG16 (arXiv:1409.1556, table 1, D): 3 x 3 convolutions, and a max pool
# before each stage but the first.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LEAST_SIDE = 64  # pixels; from 31 something is left of the deepest stage, but little


class AlexNet(nn.Module):
    """Pictures (B, H, W, 3) -> what its five convolutions give, after ReLU: (B, h, w, C) each."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        stages = []
        for i, (width, kernel, stride, pooled) in enumerate(ALEXNET):
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2))
            padding = 2 if i == 0 else kernel // 2  # the first one's is not half its kernel
            conv = nn.Conv(width, (kernel, kernel), stride, padding, name=f"conv_{i}")
            x = nn.relu(conv(x))
            stages.append(x)
        return stages


class Vgg16(nn.Module):
    """Pictures (B, H, W, 3) -> what its five stages give, after the last ReLU: (B, h, w, C) each.

    Its convolutions are conv_0 to conv_12.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        stages, count = [], 0
        for widths in VGG16:
            if stages:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for width in widths:
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=f"conv_{count}")(x))
                count += 1
            stages.append(x)
        return stages
