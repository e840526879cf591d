"""The conditioning inputs of a denoiser: semantics (labels or text) and control metadata."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Text:
    """Text features: tokens (B, T, C), mask (B, T) true at the prompt's tokens, pooled (B, C).

    Denoisers attend to all T tokens; `conditioning.text.pad` fills those outside the mask.
    """

    tokens: jax.Array
    mask: jax.Array
    pooled: jax.Array


@struct.dataclass
class Control:
    """Control metadata of Eq. 1: high (B, H) for phi_h, low (B, L) for phi_l, see `control.py`."""

    high: jax.Array
    low: jax.Array


@struct.dataclass
class Cond:
    """All conditioning inputs of a denoiser, besides x_t and t.

    semantics: class labels (B,) int32, or `Text`. control: `Control`, or None for models without.
    drop_semantics, drop_control: (B,) bool; true replaces that part by its null condition: the
    null class or all-zero text features, and a zeroed control embedding (the empty sets of Eq. 2).
    """

    semantics: jax.Array | Text
    control: Control | None
    drop_semantics: jax.Array
    drop_control: jax.Array

    @classmethod
    def of(cls, semantics: jax.Array | Text, control: Control | None = None) -> Cond:
        """The full condition: nothing is dropped."""
        batch = jax.tree.leaves(semantics)[0].shape[0]
        keep = jnp.zeros((batch,), bool)
        return cls(semantics, control, keep, keep)

    def drop(self, *, semantics: bool, control: bool) -> Cond:
        """The same condition with semantics and/or control replaced by their null conditions."""
        return self.replace(
            drop_semantics=self.drop_semantics | semantics,
            drop_control=self.drop_control | control,
        )
