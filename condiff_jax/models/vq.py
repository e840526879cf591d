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

# Spread of the first codes: about that of an untrained encoder's latents. Codes that begin nearer
# to each other are not told apart, and the encoder learns to do with a few of them.
FIRST_SPREAD = 0.5


def squared_distances(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Between latents (..., C) and codes (K, C): (..., K)."""
    product = jnp.einsum("...c,kc->...k", latents, codes)
    lengths = jnp.square(latents).sum(-1, keepdims=True)
    return lengths - 2 * product + jnp.square(codes).sum(-1)


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
        self.codebook = nn.Embed(
            size.codes, size.latent, embedding_init=nn.initializers.normal(FIRST_SPREAD)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Images (B, H, W, 3) after coding and decoding; initialises everything."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Latents (B, h, w, latent), not quantised."""
        return self.quant_conv(self.encoder(images))

    def quantise(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The nearest codes of latents (B, h, w, C): the same shape, and indices (B, h, w)."""
        codebook = self.codebook.embedding
        indices = squared_distances(latents, codebook).argmin(-1)
        return codebook[indices], indices

    def anchors(self, latents: jax.Array) -> jax.Array:
        """The one of the latents (B, h, w, C) that is nearest to each code: (K, C)."""
        latents = latents.reshape(-1, latents.shape[-1])
        return latents[squared_distances(latents, self.codebook.embedding).argmin(0)]

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
