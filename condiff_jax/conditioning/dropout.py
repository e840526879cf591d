"""Training-time dropping of conditions: what the three branches of Eq. 2 need to be trained."""

from __future__ import annotations

import jax


def drop_flags(
    key: jax.Array, batch: int, semantics: float = 0.1, control: float = 0.1
) -> tuple[jax.Array, jax.Array]:
    """(drop_semantics, drop_control), each (B,) bool.

    Semantics is dropped with probability `semantics`, and control with it: that trains
    eps(0, 0). Otherwise control alone is dropped with probability `control`: eps(0, s).
    """
    key_semantics, key_control = jax.random.split(key)
    drop_semantics = jax.random.bernoulli(key_semantics, semantics, (batch,))
    drop_control = jax.random.bernoulli(key_control, control, (batch,))
    return drop_semantics, drop_semantics | drop_control
