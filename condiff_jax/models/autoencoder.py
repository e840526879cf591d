"""Autoencoders between pictures and the space diffusion works in; they own its scale and shift."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Diffusion on pixels: no autoencoder, but the same contract, (picture - shift) * scale.

    Pictures in [-1, 1] have a standard deviation near 0.5; scale 2 gives the unit variance that
    the noise schedule was made for.
    """

    scale: float = 1.0
    shift: float = 0.0
    factor: int = 1
    channels: int = 3

    def encode(self, images: jax.Array) -> jax.Array:
        """uint8 (B, H, W, 3) -> f32 (B, H, W, 3)."""
        x = jnp.asarray(images, jnp.float32) / 127.5 - 1
        return (x - self.shift) * self.scale

    def decode(self, x: jax.Array) -> jax.Array:
        """f32 (B, H, W, 3) -> uint8 (B, H, W, 3), clipped."""
        x = x / self.scale + self.shift
        return jnp.clip(jnp.round((x + 1) * 127.5), 0, 255).astype(jnp.uint8)

    @property
    def bound(self) -> float:
        """Largest |x_0|, for samplers that clip."""
        return self.scale * (1 + abs(self.shift))
