"""`film`: the class embedding is added to the time embedding, the input of all ResNet blocks."""

import jax


def prepare_conditioning(time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
    """Add the embeddings: (B, E), (B, E) -> (B, E)."""
    return time_emb + class_emb
