"""AutoencoderVQ: an autoencoder whose decoder quantizes the latents, equal to diffusers' VQModel.

Diffusion works on the latents before quantization (arXiv:2112.10752, Sec. 3.1): quantization is
the first layer of the decoder.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.models.kl import Decoder, Encoder, Size

# Standard deviation of the codes at initialization, about that of an untrained encoder's latents.
# With codes closer to each other, the encoder learns to use only a few of them.
CODEBOOK_INIT_STD = 0.5


def squared_distances(latents: jax.Array, codes: jax.Array) -> jax.Array:
    """Squared distances (..., K) between latents (..., C) and codes (K, C)."""
    product = jnp.einsum("...c,kc->...k", latents, codes)
    lengths = jnp.square(latents).sum(-1, keepdims=True)
    return lengths - 2 * product + jnp.square(codes).sum(-1)


class AutoencoderVQ(nn.Module):
    """Autoencoder between images (B, H, W, 3) in [-1, 1] and latents (B, h, w, latent), f32."""

    size: Size
    dtype: Any = jnp.float32

    def setup(self):
        size = self.size
        self.encoder = Encoder(size, size.latent, self.dtype)
        self.decoder = Decoder(size, self.dtype)
        self.quant_conv = nn.Conv(size.latent, (1, 1))
        self.post_quant_conv = nn.Conv(size.latent, (1, 1))
        self.codebook = nn.Embed(
            size.codes, size.latent, embedding_init=nn.initializers.normal(CODEBOOK_INIT_STD)
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstruct images (B, H, W, 3); initializes all parameters."""
        return self.decode(self.encode(images))

    def encode(self, images: jax.Array) -> jax.Array:
        """Encode to latents (B, h, w, latent), not quantized."""
        return self.quant_conv(self.encoder(images))

    def quantize(self, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the nearest codes of latents (B, h, w, C), and their indices (B, h, w)."""
        codebook = self.codebook.embedding
        indices = squared_distances(latents, codebook).argmin(-1)
        return codebook[indices], indices

    def anchors(self, latents: jax.Array) -> jax.Array:
        """Return, for each code, the nearest of the latents (B, h, w, C): (K, C)."""
        latents = latents.reshape(-1, latents.shape[-1])
        return latents[squared_distances(latents, self.codebook.embedding).argmin(0)]

    def decode(self, latents: jax.Array) -> jax.Array:
        """Decode the latents' nearest codes to images (B, H, W, 3), near [-1, 1], not clipped.

        Quantization has a straight-through gradient (arXiv:1711.00937).
        """
        codes, _ = self.quantize(latents)
        codes = latents + jax.lax.stop_gradient(codes - latents)
        return self.decoder(self.post_quant_conv(codes))

    @staticmethod
    def sample(moments: jax.Array, noise: jax.Array | None) -> jax.Array:
        """Return the latents: the encoder is deterministic."""
        return moments
