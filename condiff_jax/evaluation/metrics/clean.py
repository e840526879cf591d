"""Resizing of images for FID's network as in clean-fid (arXiv:2104.11222).

Pillow's antialiased bicubic interpolation of single channels in float32: nothing is rounded to
8 bits, and the result is clipped to 0..255 once, at the end.
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
    """Return the interpolation weights (size, n) f32 of n pixels for `size`; rows sum to 1.

    The kernel is widened by the factor of shrinking (antialiasing), and cut at the borders.
    """
    scale = n / size
    width = max(scale, 1.0)
    out = np.zeros((size, n))
    for i, row in enumerate(out):
        center = (i + 0.5) * scale
        low = int(center - 2 * width + 0.5)
        high = int(center + 2 * width + 0.5)
        for x in range(max(low, 0), min(high, n)):
            row[x] = cubic(abs(x + 0.5 - center) / width)
    return (out / out.sum(1, keepdims=True)).astype(np.float32)


@jax.jit
def resize(images: jax.Array) -> jax.Array:
    """Resize images (B, H, W, 3) of any size to (B, SIDE, SIDE, 3), f32 in 0..255."""
    rows, columns = (weights(n) for n in images.shape[1:3])
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    x = product("bhwc,xw->bhxc", images.astype(jnp.float32), columns)
    return jnp.clip(product("bhxc,yh->byxc", x, rows), 0, 255)
