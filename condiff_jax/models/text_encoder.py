"""Trainable word embedding, the text encoder of data without CLIP features."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from condiff_jax.conditioning.cond import Text

END, UNKNOWN = "<end>", "<unk>"


def word_tokenizer(words: Iterable[str]) -> Tokenizer:
    """Create a lower-casing word-level tokenizer (of the `tokenizers` library) over `words`."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([END, UNKNOWN, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z0-9']+"), "removed", invert=True)
    return tokenizer


def tokenize(
    tokenizer: Tokenizer,
    caption: str,
    length: int,
    *,
    start: tuple[int, ...] = (),
    end: int = 0,
    pad: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize to ids int32 and mask bool (length,): `start`, truncated words, `end`, `pad`."""
    words = tokenizer.encode(caption, add_special_tokens=False).ids
    ids = [*start, *words[: length - len(start) - 1], end]
    out = np.full((length,), pad, np.int32)
    out[: len(ids)] = ids
    return out, np.arange(length) < len(ids)


class WordEmbedding(nn.Module):
    """Ids and mask (B, T) -> `Text`: word plus position embeddings; pooled is their masked mean."""

    vocabulary: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> Text:
        init = nn.initializers.normal(1.0)
        tokens = nn.Embed(
            self.vocabulary, self.width, embedding_init=init, dtype=self.dtype, name="words"
        )(ids)
        table = self.param("positions", nn.initializers.normal(0.2), (ids.shape[1], self.width))
        tokens = tokens + table.astype(self.dtype)
        weights = (mask / jnp.maximum(mask.sum(1, keepdims=True), 1)).astype(self.dtype)
        return Text(tokens, mask, jnp.einsum("btc,bt->bc", tokens, weights))
