"""Softmax attention with one entry point and a backend for each kind of device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention as pallas
from jax.sharding import PartitionSpec as P

# Number of keys from which `flash` saves memory: with fewer, XLA needs no more for its logits.
FLASH_MIN_KEYS = 1024
TILE = 128  # tokens in a tile of a TPU
FASTEST = {"gpu": "cudnn", "cuda": "cudnn", "tpu": "flash"}  # by platform, xla elsewhere


def fastest(platform: str, dtype: jnp.dtype) -> str:
    """Return the backend that model.attention=auto selects on a platform."""
    name = FASTEST.get(platform, "xla")
    return "xla" if name == "cudnn" and dtype != jnp.bfloat16 else name


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, backend: str = "xla", bias: jax.Array | None = None
) -> jax.Array:
    """Softmax attention of q (B, T, heads, head size) to k and v (B, S, heads, head size).

    bias (B or 1, heads, T, S), f32, is added to the logits. xla replaces a backend that does not
    support the inputs: cudnn needs a head size of at most 128 that is a multiple of 8, flash needs
    FLASH_MIN_KEYS keys and no bias.
    """
    head_size = q.shape[-1]
    if backend == "cudnn" and head_size <= 128 and head_size % 8 == 0:
        return cudnn(q, k, v, bias)
    if backend == "flash" and bias is None and k.shape[1] >= FLASH_MIN_KEYS:
        return flash(q, k, v)
    return xla(q, k, v, bias)


def xla(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Attention in plain JAX, with the softmax in f32."""
    # Heads come before tokens, as in XLA's own attention kernels. On CPUs this is faster than
    # jax.nn.dot_product_attention.
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))  # (B, heads, T, head size)
    q = q * q.shape[-1] ** -0.5
    logits = jnp.einsum("bhtc,bhsc->bhts", q, k, preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bhsc->bhtc", weights, v).swapaxes(1, 2)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """cuDNN's flash attention, for f16 or bf16 inputs.

    JAX (0.10.2 to 0.12.0) rejects its gradient at odd lengths. These are padded by one token, which
    the sequence lengths exclude: its values have no effect, and its gradient is dropped.
    """
    tokens, keys = q.shape[1], k.shape[1]
    lengths = {}
    if tokens % 2 or keys % 2:
        full = partial(jnp.full, q.shape[:1], dtype=jnp.int32)
        lengths = {"query_seq_lengths": full(tokens), "key_value_seq_lengths": full(keys)}
        q, k, v = (_pad(a, 2, 1) for a in (q, k, v))
        bias = None if bias is None else _pad(_pad(bias, 2, 2), 2, 3)
    bias = None if bias is None else bias.astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn", **lengths)
    return out[:, :tokens]


def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Pallas' flash attention kernel for TPUs, which does not store the logits.

    Tokens are padded to whole tiles; the padding is a separate segment. XLA cannot shard a kernel,
    so each device runs it on its own examples, see `sharding.traced_on`.
    """
    tokens = q.shape[1]
    ids = pallas.SegmentIds(
        *(_pad(jnp.zeros(a.shape[:2], jnp.int32), TILE, axis=1, value=1) for a in (q, k))
    )
    q, k, v = (_pad(a, TILE, 1).swapaxes(1, 2) for a in (q, k, v))  # (B, heads, T, head size)

    def kernel(q, k, v, ids):
        scale, blocks = q.shape[-1] ** -0.5, _blocks(q.shape[2], k.shape[2])
        return pallas.flash_attention(q, k, v, None, ids, sm_scale=scale, block_sizes=blocks)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = P(mesh.axis_names)
        # check_vma is off because the kernel does not declare over which axes its output varies.
        kernel = jax.shard_map(kernel, in_specs=spec, out_specs=spec, check_vma=False)
    return kernel(q, k, v, ids).swapaxes(1, 2)[:, :tokens]


def _pad(x: jax.Array, multiple: int, axis: int, value: int = 0) -> jax.Array:
    """Pad x with `value` at the end of an axis, to a length that `multiple` divides."""
    width = [(0, 0)] * x.ndim
    width[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, width, constant_values=value)


def _blocks(queries: int, keys: int) -> pallas.BlockSizes:
    """Return the largest blocks, of at most four tiles, that divide the padded lengths."""
    q, k = (max(n for n in range(TILE, 4 * TILE + 1, TILE) if t % n == 0) for t in (queries, keys))
    return pallas.BlockSizes(
        block_b=1, block_q=q, block_k_major=k, block_k=k,
        block_q_major_dkv=q, block_k_major_dkv=k, block_k_dkv=k, block_q_dkv=q,
        block_k_major_dq=k, block_k_dq=k, block_q_dq=q,
    )  # fmt: skip


BACKENDS = ("auto", "xla", "cudnn", "flash")
