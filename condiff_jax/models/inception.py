"""Inception-v3 of FID: the TensorFlow graph of 2015-12-05, equal to torch-fidelity's.

It differs from the network of arXiv:1512.00567: average pools exclude their padding from the mean,
the pool of the last block is a max pool, there are 1008 logits, and images are resized as in
TensorFlow 1. Modules have the names of the weight files of pytorch-fid and torch-fidelity.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

SIDE = 299  # pixels of the input
WIDTH = 2048  # number of features


class Unit(nn.Module):
    """Convolution, batch norm and ReLU.

    kernel: side, or (height, width). padding: by default SAME at stride 1, VALID otherwise.
    """

    width: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padding: str = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = (self.kernel,) * 2 if isinstance(self.kernel, int) else self.kernel
        padding = self.padding or ("SAME" if self.stride == 1 else "VALID")
        x = nn.Conv(self.width, kernel, self.stride, padding, use_bias=False, name="conv")(x)
        return nn.relu(Norm(name="bn")(x))


class Norm(nn.Module):
    """Batch norm over the last axis with fixed running statistics (inference)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def parameter(name, init):
            return self.param(name, init, x.shape[-1:])

        scale = parameter("scale", nn.initializers.ones)
        bias = parameter("bias", nn.initializers.zeros)
        mean = parameter("running_mean", nn.initializers.zeros)
        variance = parameter("running_var", nn.initializers.ones)
        return (x - mean) * (scale * jax.lax.rsqrt(variance + 1e-3)) + bias


def chain(x: jax.Array, name: str, *units: tuple) -> jax.Array:
    """Apply Units with these fields in sequence, named name_1, name_2, ..."""
    for i, fields in enumerate(units, 1):
        x = Unit(*fields, name=f"{name}_{i}")(x)
    return x


def fork(x: jax.Array, name: str) -> jax.Array:
    """Apply two parallel Units, 1 x 3 and 3 x 1, named name + "a" and name + "b"."""
    return join(Unit(384, (1, 3), name=f"{name}a")(x), Unit(384, (3, 1), name=f"{name}b")(x))


def join(*branches: jax.Array) -> jax.Array:
    """Concatenate the channels of all branches."""
    return jnp.concatenate(branches, -1)


def avg_pool(x: jax.Array) -> jax.Array:
    """3 x 3 average pool with stride 1; padding is excluded from the mean."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def max_pool(x: jax.Array, stride: int = 2) -> jax.Array:
    """3 x 3 max pool: SAME padding at stride 1, VALID otherwise."""
    return nn.max_pool(x, (3, 3), (stride, stride), "SAME" if stride == 1 else "VALID")


class MixedA(nn.Module):
    """Inception block: (B, 35, 35, C) -> (B, 35, 35, 224 + pool)."""

    pool: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return join(
            Unit(64, 1, name="branch1x1")(x),
            chain(x, "branch5x5", (48, 1), (64, 5)),
            chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            Unit(self.pool, 1, name="branch_pool")(avg_pool(x)),
        )


class MixedB(nn.Module):
    """Inception block: (B, 35, 35, C) -> (B, 17, 17, 480 + C)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return join(
            Unit(384, 3, 2, name="branch3x3")(x),
            chain(x, "branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
            max_pool(x),
        )


class MixedC(nn.Module):
    """Inception block: (B, 17, 17, 768) -> (B, 17, 17, 768); width: channels inside branches."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, row, column = self.width, (1, 7), (7, 1)
        return join(
            Unit(192, 1, name="branch1x1")(x),
            chain(x, "branch7x7", (n, 1), (n, row), (192, column)),
            chain(x, "branch7x7dbl", (n, 1), (n, column), (n, row), (n, column), (192, row)),
            Unit(192, 1, name="branch_pool")(avg_pool(x)),
        )


class MixedD(nn.Module):
    """Inception block: (B, 17, 17, 768) -> (B, 8, 8, 1280)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return join(
            chain(x, "branch3x3", (192, 1), (320, 3, 2)),
            chain(x, "branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
            max_pool(x),
        )


class MixedE(nn.Module):
    """Inception block: (B, 8, 8, C) -> (B, 8, 8, 2048); max_pool: true in the last block only."""

    max_pool: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        pooled = max_pool(x, 1) if self.max_pool else avg_pool(x)
        return join(
            Unit(320, 1, name="branch1x1")(x),
            fork(Unit(384, 1, name="branch3x3_1")(x), "branch3x3_2"),
            fork(chain(x, "branch3x3dbl", (448, 1), (384, 3)), "branch3x3dbl_3"),
            Unit(192, 1, name="branch_pool")(pooled),
        )


class InceptionV3(nn.Module):
    """Inception-v3: images (B, 299, 299, 3) in 0..255 -> features (B, 2048), logits (B, 1008)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = (images - 128) / 128
        x = Unit(32, 3, 2, name="Conv2d_1a_3x3")(x)  # (B, 149, 149, 32)
        x = Unit(32, 3, padding="VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(Unit(64, 3, name="Conv2d_2b_3x3")(x))  # (B, 73, 73, 64)
        x = Unit(80, 1, name="Conv2d_3b_1x1")(x)
        x = max_pool(Unit(192, 3, padding="VALID", name="Conv2d_4a_3x3")(x))  # (B, 35, 35, 192)
        x = MixedA(32, name="Mixed_5b")(x)
        x = MixedA(64, name="Mixed_5c")(x)
        x = MixedA(64, name="Mixed_5d")(x)
        x = MixedB(name="Mixed_6a")(x)  # (B, 17, 17, 768)
        x = MixedC(128, name="Mixed_6b")(x)
        x = MixedC(160, name="Mixed_6c")(x)
        x = MixedC(160, name="Mixed_6d")(x)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)  # (B, 8, 8, 1280)
        x = MixedE(False, name="Mixed_7b")(x)
        x = MixedE(True, name="Mixed_7c")(x)  # (B, 8, 8, 2048)
        features = x.mean((1, 2))
        return features, nn.Dense(1008, name="fc")(features)


@jax.jit
def resize(images: jax.Array) -> jax.Array:
    """Resize images (B, H, W, 3) to (B, SIDE, SIDE, 3), f32: bilinear as in TensorFlow 1.

    Pixel i of the result is at i * H / SIDE of the source, not at the center of the area that it
    covers, and there is no antialiasing: FID is defined with this resize.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        n = x.shape[axis]
        position = np.arange(SIDE, dtype=np.float32) * np.float32(n / SIDE)
        low = position.astype(np.int32)
        shape = [1, 1, 1, 1]
        shape[axis] = SIDE
        fraction = (position - low).reshape(shape)
        first = jnp.take(x, low, axis)
        x = first + (jnp.take(x, np.minimum(low + 1, n - 1), axis) - first) * fraction
    return x


def features(params: dict, images: jax.Array) -> jax.Array:
    """FID features (B, 2048) of images from `resize`."""
    return InceptionV3().apply({"params": params}, images)[0]
