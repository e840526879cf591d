"""AutoencoderVQ: latents that its decoder rounds to a codebook, equal to diffusers' VQModel.

Diffusion works on the latents before quantisation (arXiv:2112.10752, Sec. 3.1): quantisation is
the decoder's first layer.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models.kl import Decoder, Encoder, Size


def near_zero(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
    """First codes (K, C): uniform within 1 / K, so that none is far from the first latents."""
    return jax.random.uniform(key, shape, dtype, -1 / shape[0], 1 / shape[0])


class AutoencoderVQ(nn.Module):
    """Images f32 (B, H, W, 3) in [-1, 1] to and from latents (B, h, w, latent), both f32."""

    size: Size
    dtype: Any = jnp.float32

    def setup(self):
        size = self.size
        self.encoder = Encoder(size, size.latent, self.dtype)
        self.decoder = Decoder(size, self.dtype)
        self.quant_conv = nn.Conv(size.latent, (1, 1))
        self.post_quant_conv = nn.Conv(size.latent, (1, 1))
        self.codebook = nn.Embed(size.codes, size.latent, embedding_init=near_zero)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) after coding and decoding; initialises everything."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Latents (B, h, w, latent), not quantised."""
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest codes of latents (B, h, w, C): the same shape, and indices (B, h, w)."""
        # |z - e|^2 without |z|^2, which is the same for all codes
        codebook = self.codebook.embedding
        product = jnp.einsum("bhwc,kc->bhwk", latents, codebook)
        indices = (jnp.square(codebook).sum(-1) - 2 * product).argmin(-1)
        return codebook[indices], indices

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) of the latents' nearest codes, near [-1, 1] but not clipped.

        Gradients pass the rounding unchanged (straight through, arXiv:1711.00937).
        """
        codes, _ = self.quantise(latents)
        codes = latents + jax.lax.stop_gradient(codes - latents)
        return self.decoder(self.post_quant_conv(codes))

    @staticmethod
    def sample(moments: jax.Array, noise: jax.Array | None) -> jax.Array:
        """The latents themselves: here `encode` gives no distribution."""
        return moments
