"""Padding of text token embeddings to a fixed length (Sec. 2.1, Eq. 7, Table 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from condiff_jax.conditioning.cond import Text


@dataclasses.dataclass(frozen=True)
class Padding:
    """A way to fill the positions outside the mask.

    fill(text, beta, noise) -> tokens (B, T, C). noise: whether it takes standard normal noise
    (B, T, C); else None is passed. pytorch: whether `PADDINGS` of pytorch/models.py has it, too;
    mode export needs that.
    """

    fill: Callable[[Text, float, jax.Array | None], jax.Array]
    noise: bool = False
    pytorch: bool = False


def pad(text: Text, method: str, *, beta: float = 0.0, noise: jax.Array | None = None) -> Text:
    """Fill the positions outside the mask by a method of `PADDINGS`.

    Tokens outside the mask have no influence on the result. ValueError for an unknown method, and
    where noise is missing.
    """
    if method not in PADDINGS:
        raise ValueError(f"unknown text padding {method!r}, choose from {', '.join(PADDINGS)}")
    padding = PADDINGS[method]
    if padding.noise and noise is None:
        raise ValueError(f"{method} padding needs noise (B, T, C)")
    return text.replace(tokens=padding.fill(text, beta, noise))


def zero(text: Text, beta: float, noise: jax.Array | None) -> jax.Array:
    """Zeros, the usual baseline."""
    return jnp.where(text.mask[..., None], text.tokens, 0)


def replicate(text: Text, beta: float, noise: jax.Array | None) -> jax.Array:
    """The n tokens inside the mask, repeated cyclically to T."""
    return _repeat(text)[0]


def noisy_replicate(text: Text, beta: float, noise: jax.Array) -> jax.Array:
    """Eq. 7: `replicate` + sqrt(beta) sqrt(m - 1) sigma_ch eps on all T tokens.

    m = ceil(T / n) counts the repetitions, sigma_ch is the standard deviation of each channel over
    the n tokens, noise is eps. A prompt of n = T tokens gets no noise. We read "small variance
    beta_txt" as a variance, hence its square root.
    """
    tokens, n = _repeat(text)
    repeats = -(-text.mask.shape[1] // n)  # m, (B,)
    scale = jnp.sqrt(beta * (repeats - 1))[:, None, None] * channel_std(text)  # (B, 1, C)
    return tokens + scale * noise


def _repeat(text: Text) -> tuple[jax.Array, jax.Array]:
    """The tokens inside the mask, repeated to T: (B, T, C), and their number n (B,)."""
    mask = text.mask[..., None]
    n = jnp.maximum(text.mask.sum(1), 1)
    source = jnp.arange(text.mask.shape[1]) % n[:, None]  # (B, T)
    tokens = jnp.where(mask, text.tokens, 0)
    return jnp.take_along_axis(tokens, source[..., None], axis=1), n


PADDINGS = {
    "zero": Padding(zero, pytorch=True),
    "replicate": Padding(replicate, pytorch=True),
    "noisy_replicate": Padding(noisy_replicate, noise=True, pytorch=True),
}


def channel_std(text: Text) -> jax.Array:
    """Standard deviation of each channel over the valid tokens, (B, 1, C)."""
    mask = text.mask[..., None]
    n = jnp.maximum(mask.sum(1, keepdims=True), 1)
    mean = jnp.where(mask, text.tokens, 0).sum(1, keepdims=True) / n
    variance = jnp.where(mask, (text.tokens - mean) ** 2, 0).sum(1, keepdims=True) / n
    # The root has no gradient at 0, which is the variance of a prompt of one token.
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
