"""Word embedding by hand."""

import jax.numpy as jnp
import numpy as np

from condiff_jax.models.text_encoder import WordEmbedding


def test_tokens_are_words_plus_positions_and_pooled_is_the_mean_of_those_in_the_mask():
    words = np.array([[0, 0], [1, 10], [2, 20]], np.float32)
    positions = np.array([[0.1, 0], [0.2, 0], [0.3, 0], [0.4, 0]], np.float32)
    params = {"words": {"embedding": words}, "positions": positions}
    ids = jnp.array([[2, 1, 0, 0], [1, 2, 2, 1]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool)
    text = WordEmbedding(3, 2).apply({"params": params}, ids, mask)
    first, second = np.asarray(words[ids] + positions)
    np.testing.assert_allclose(text.tokens, [first, second], rtol=1e-6)
    np.testing.assert_allclose(text.pooled, [first[:2].mean(0), second.mean(0)], rtol=1e-6)
    np.testing.assert_array_equal(text.mask, mask)
