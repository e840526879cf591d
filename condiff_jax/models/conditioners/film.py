"""The class is added to the time embedding, which all ResNet blocks hear (`concat-film`)."""

import jax


def prepare_conditioning(time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
    """(B, E), (B, E) -> (B, E)."""
    return time_emb + class_emb
