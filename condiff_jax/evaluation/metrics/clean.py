"""Pictures at the side of FID's network as clean-fid resizes them (arXiv:2104.11222).

Pillow's antialiased bicubic, a channel at a time in float32: nothing is rounded to grey levels, and
the result is clipped to 0..255 once, at the end.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.data.resize import cubic
from condiff_jax.models.inception import SIDE


@functools.lru_cache(64)
def weights(n: int, size: int = SIDE) -> np.ndarray:
    """Row i: what each of n pixels is to pixel i of `size`, (size, n) f32; rows sum to 1.

    The kernel is as wide as where it shrinks needs, and cut at the borders.
    """
    scale = n / size
    width = max(scale, 1.0)
    out = np.zeros((size, n))
    for i, row in enumerate(out):
        centre = (i + 0.5) * scale
        low, high = (int(centre + side * 2 * width + 0.5) for side in (-1, 1))
        for x in range(max(low, 0), min(high, n)):
            row[x] = cubic(abs(x + 0.5 - centre) / width)
    return (out / out.sum(1, keepdims=True)).astype(np.float32)


@jax.jit
def resize(images: jax.Array) -> jax.Array:
    """Pictures (B, H, W, 3) of any size at (B, SIDE, SIDE, 3), f32 in 0..255."""
    rows, columns = (weights(n) for n in images.shape[1:3])
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = product("bhwc,xw->bhxc", images.astype(jnp.float32), columns)
    return jnp.clip(product("bhxc,yh->byxc", x, rows), 0, 255)
