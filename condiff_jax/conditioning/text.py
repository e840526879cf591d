"""Padding of text token embeddings to a fixed length (Sec. 2.1, Eq. 7, Table 3)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Text

PADDINGS = ("zero", "replicate", "noisy_replicate")


def pad(text: Text, method: str, *, beta: float = 0.0, noise: jax.Array | None = None) -> Text:
    """Fill the positions outside the mask; what stood there before has no influence.

    zero: zeros (the usual baseline). replicate: the n valid tokens repeated cyclically to T.
    noisy_replicate (Eq. 7): phi + sqrt(beta) sqrt(m - 1) sigma_ch(phi) eps on all T tokens, with
    m = ceil(T / n) repetitions and sigma_ch the per-channel standard deviation over the valid
    tokens; noise (B, T, C) is the standard normal eps. A prompt of n = T tokens gets no noise.
    We read "small variance beta_txt" as a variance, hence its square root.
    """
    mask = text.mask[..., None]
    if method == "zero":
        return text.replace(tokens=jnp.where(mask, text.tokens, 0))
    if method not in PADDINGS:
        raise ValueError(f"unknown text padding {method!r}, choose from {', '.join(PADDINGS)}")
    length = text.mask.shape[1]
    n = jnp.maximum(text.mask.sum(1), 1)  # (B,)
    source = jnp.arange(length) % n[:, None]  # (B, T)
    tokens = jnp.take_along_axis(jnp.where(mask, text.tokens, 0), source[..., None], axis=1)
    if method == "replicate":
        return text.replace(tokens=tokens)
    if noise is None:
        raise ValueError("noisy_replicate padding needs noise (B, T, C)")
    repeats = -(-length // n)  # m, (B,)
    scale = jnp.sqrt(beta * (repeats - 1))[:, None, None] * channel_std(text)  # (B, 1, C)
    return text.replace(tokens=tokens + scale * noise)


def channel_std(text: Text) -> jax.Array:
    """Standard deviation of each channel over the valid tokens, (B, 1, C)."""
    mask = text.mask[..., None]
    n = jnp.maximum(mask.sum(1, keepdims=True), 1)
    mean = jnp.where(mask, text.tokens, 0).sum(1, keepdims=True) / n
    variance = jnp.where(mask, (text.tokens - mean) ** 2, 0).sum(1, keepdims=True) / n
    # The root has no gradient at 0, where a prompt of one token puts it.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
