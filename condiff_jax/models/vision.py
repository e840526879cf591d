"""Frozen feature networks that metrics look at pictures with."""

from __future__ import annotations

import flax.linen as nn
import jax

# Width, kernel and stride of AlexNet's convolutions, and whether a max pool comes before
# (arXiv:1404.5997, without its normalisation layers).
ALEXNET = ((64, 11, 4, False), (192, 5, 1, True), (384, 3, 1, True), (256, 3, 1, False))
ALEXNET += ((256, 3, 1, False),)
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
