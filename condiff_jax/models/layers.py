"""Common layers of the models: attention, MLP, modulation, patches, position embedding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from condiff_jax.conditioning.control import sinusoid
from condiff_jax.models.attention import attention

xavier = nn.initializers.xavier_uniform()
normal = nn.initializers.normal(0.02)
zeros = nn.initializers.zeros


def constrain_batch(x: jax.Array) -> jax.Array:
    """Shard x (B, ...) by example over the mesh set by `sharding.traced_on`; x without a mesh.

    Otherwise XLA would shard activations like the parameters they are multiplied with, and
    communicate activations instead of gathering the parameters, which are far smaller.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P(mesh.axis_names))


def layer_norm(x: jax.Array) -> jax.Array:
    """LayerNorm over channels without scale and bias, eps 1e-6, computed in f32."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
    return y.astype(x.dtype)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """AdaLN: x (B, T, D) scaled by 1 + scale (B, D), shifted by shift (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
    """AdaLN-zero: `count` vectors (B, D) from an embedding (B, D), zero at initialization."""

    count: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, emb: jax.Array) -> list[jax.Array]:
        width = self.count * emb.shape[-1]
        x = nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="linear")(nn.silu(emb))
        return jnp.split(x, self.count, axis=-1)


class AdaGN(nn.Module):
    """Adaptive group normalization (arXiv:2105.05233, Sec. 3): y_s GroupNorm(h) + y_b.

    h (B, H, W, C) and an embedding (B, E), whose linear projection is [y_s, y_b], -> h's shape and
    dtype. The bias of y_s starts at one: without it, y_s would start near zero.
    """

    groups: int
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, h: jax.Array, emb: jax.Array) -> jax.Array:
        width = h.shape[-1]
        norm = nn.GroupNorm(
            self.groups, epsilon=self.epsilon, use_scale=False, use_bias=False, dtype=jnp.float32
        )

        def identity(key, shape, dtype):
            return jnp.repeat(jnp.array([1.0, 0.0], dtype), width)

        project = nn.Dense(2 * width, bias_init=identity, dtype=self.dtype, name="projection")
        scale, shift = jnp.split(project(emb)[:, None, None], 2, axis=-1)
        return (scale * norm(h) + shift).astype(h.dtype)


class Mlp(nn.Module):
    """Linear-activation-Linear, (B, T, D) -> (B, T, out); GELU (tanh) by default."""

    hidden: int
    out: int
    dtype: Any = jnp.float32
    activation: Callable = partial(nn.gelu, approximate=True)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        x = self.activation(x)
        return nn.Dense(self.out, kernel_init=xavier, dtype=self.dtype, name="fc2")(x)


class VectorEmbed(nn.Module):
    """Linear-SiLU-Linear of a vector (B, C) to (B, width).

    The initialization preserves the variance at every width; DiT's normal(0.02) gives small
    embeddings at the widths of our small models.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(x)
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(nn.silu(x))


class TimestepEmbed(nn.Module):
    """Timestep embedding: t (B,) -> 256 sinusoids -> Linear-SiLU-Linear -> (B, width)."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        return VectorEmbed(self.width, self.dtype, name="mlp")(sinusoid(t, 256))


class HeadProjection(nn.Module):
    """Linear (B, T, C) -> (B, T, heads, width / heads), the input layout of `attention`.

    width: C by default.
    """

    heads: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    width: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = (self.heads, (self.width or x.shape[-1]) // self.heads)
        return nn.DenseGeneral(
            features, use_bias=self.use_bias, kernel_init=xavier, dtype=self.dtype, name="linear"
        )(x)


class HeadMerge(nn.Module):
    """Linear (B, T, heads, head size) -> (B, T, heads * head size)."""

    dtype: Any = jnp.float32
    kernel_init: Callable = xavier

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-2] * x.shape[-1]
        merge = nn.DenseGeneral(
            width, axis=(-2, -1), kernel_init=self.kernel_init, dtype=self.dtype, name="linear"
        )
        # Without the constraint, TPUs would gather the output of cross-attention.
        return constrain_batch(merge(x))


def rms_norm(enabled: bool, name: str):
    """Return an RMSNorm over the head size (Sec. 3.1), in f32; the identity if disabled."""
    if not enabled:
        return lambda x: x
    norm = nn.RMSNorm(epsilon=1e-6, dtype=jnp.float32, name=name)
    return lambda x: norm(x).astype(x.dtype)


class Attention(nn.Module):
    """Multi-head attention of x (B, T, D) to itself or to a context (B, S, C)."""

    heads: int
    qk_norm: bool = False
    backend: str = "xla"
    dtype: Any = jnp.float32
    out_init: Callable = xavier
    use_bias: bool = True  # of queries, keys and values

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array | None = None, bias: jax.Array | None = None
    ) -> jax.Array:
        context = x if context is None else context
        project = partial(HeadProjection, self.heads, self.use_bias, self.dtype, width=x.shape[-1])
        q = rms_norm(self.qk_norm, "query_norm")(project(name="query")(x))
        k = rms_norm(self.qk_norm, "key_norm")(project(name="key")(context))
        v = project(name="value")(context)
        return HeadMerge(self.dtype, self.out_init, name="out")(
            attention(q, k, v, self.backend, bias)
        )


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Split into patches, row by row: (B, H, W, C) -> (B, H/p * W/p, p * p * C), channels last."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
    return x.reshape(b, h * w // patch**2, patch**2 * c)


def unpatchify(x: jax.Array, patch: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: (B, N, p * p * C) -> (B, height, width, C)."""
    b = x.shape[0]
    x = x.reshape(b, height // patch, width // patch, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, height, width, -1)


def position_grid(grid: int, base: int, mode: str = "resample") -> np.ndarray:
    """Token coordinates (grid,) along one axis, for a model whose base grid is `base`.

    resample: linspace(0, base, grid), the same limits at every resolution (pseudocode 1).
    extrapolate: 0, 1, 2, ..., the baseline of Fig. 8a.
    """
    if mode == "resample":
        return np.linspace(0, base, grid)
    if mode == "extrapolate":
        return np.arange(grid, dtype=np.float64)
    raise ValueError(f"unknown position embedding {mode!r}, choose resample or extrapolate")


def position_embedding(
    width: int, height: int, columns: int, base: int, mode: str = "resample"
) -> np.ndarray:
    """2-D sin-cos position embedding (height * columns, width), f32.

    The first half of the channels encodes the column, the second half the row. Each half has
    sines, then cosines, with periods up to 10000 (the convention of MAE, DiT and diffusers).
    """

    def encode(position):  # (N,) -> (N, width / 2)
        frequency = 10000.0 ** (-np.arange(width // 4) / (width / 4))
        angle = position[:, None] * frequency
        return np.concatenate([np.sin(angle), np.cos(angle)], 1)

    rows, cols = np.meshgrid(
        position_grid(height, base, mode), position_grid(columns, base, mode), indexing="ij"
    )
    return np.concatenate([encode(cols.ravel()), encode(rows.ravel())], 1).astype(np.float32)
