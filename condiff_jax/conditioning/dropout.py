"""Drop conditions in training, which trains the three branches of Eq. 2."""

from __future__ import annotations

import jax

DROP_MODES = ("nested", "independent")


def drop_flags(
    key: jax.Array,
    batch: int,
    semantics: float = 0.1,
    control: float = 0.1,
    drop_mode: str = "nested",
) -> tuple[jax.Array, jax.Array]:
    """Draw (drop_semantics, drop_control), each (B,) bool.

    nested: semantics is dropped with probability `semantics`, and control with it: that trains
    eps(0, 0). Otherwise control alone is dropped with probability `control`: eps(0, s).
    independent: each is dropped or not whatever the other is; eps(0, 0) is rare then, and eps(c, 0)
    is trained, which Eq. 2 does not use. ValueError for another `drop_mode`.
    """
    if drop_mode not in DROP_MODES:
        raise ValueError(f"unknown drop_mode {drop_mode!r}, choose from {', '.join(DROP_MODES)}")
    key_semantics, key_control = jax.random.split(key)
    drop_semantics = jax.random.bernoulli(key_semantics, semantics, (batch,))
    drop_control = jax.random.bernoulli(key_control, control, (batch,))
    if drop_mode == "nested":
        drop_control = drop_semantics | drop_control
    return drop_semantics, drop_control
