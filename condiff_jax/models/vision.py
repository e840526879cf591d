"""Frozen backbones of LPIPS: the convolutions of AlexNet and of VGG16.

The network of FID is in inception.py, the image tower of CLIP in clip.py.
"""

from __future__ import annotations

import flax.linen as nn
import jax

# Width, kernel and stride of AlexNet's convolutions, and whether a max pool comes before
# (arXiv:1404.5997, without its normalization layers).
ALEXNET = ((64, 11, 4, False), (192, 5, 1, True), (384, 3, 1, True), (256, 3, 1, False))
ALEXNET += ((256, 3, 1, False),)
# Widths of the stages of VGG16 (arXiv:1409.1556, table 1, D): 3 x 3 convolutions, and a max pool
# before each stage but the first.
VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Smallest side of an input, in pixels. The deepest stage has output from 31 pixels, but little.
MIN_SIDE = 64


class AlexNet(nn.Module):
    """AlexNet: images (B, H, W, 3) -> outputs (B, h, w, C) of its five convolutions, after ReLU."""

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        stages = []
        for i, (width, kernel, stride, pooled) in enumerate(ALEXNET):
            if pooled:
                x = nn.max_pool(x, (3, 3), (2, 2))
            padding = 2 if i == 0 else kernel // 2
            conv = nn.Conv(width, (kernel, kernel), stride, padding, name=f"conv_{i}")
            x = nn.relu(conv(x))
            stages.append(x)
        return stages


class Vgg16(nn.Module):
    """VGG16: images (B, H, W, 3) -> outputs (B, h, w, C) of its five stages, after ReLU.

    The convolutions are named conv_0 to conv_12.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        stages = []
        count = 0
        for widths in VGG16:
            if stages:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for width in widths:
                x = nn.relu(nn.Conv(width, (3, 3), padding=1, name=f"conv_{count}")(x))
                count += 1
            stages.append(x)
        return stages
