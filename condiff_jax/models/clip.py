"""CLIP's towers and tokenizer, equal to transformers' CLIPModel and CLIPTokenizer."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from condiff_jax.conditioning.cond import Text
from condiff_jax.models import layers
from condiff_jax.models.layers import Attention, Mlp, patchify
from condiff_jax.models.text_encoder import tokenize

# By their names in config.json; OpenAI's models use quick_gelu.
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": partial(nn.gelu, approximate=False),
}
# Mean and standard deviation of each channel of OpenAI's training images, for pixels in 0..1.
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
# Files of a checkpoint folder besides its weights.
CONFIG = "config.json"
WORDS = ("vocab.json", "merges.txt")


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes and conventions of a text tower, by default those of ViT-L/14.

    words: vocabulary size. length: tokens of a text. end: id of the end token. OpenAI's files have
    2 there, which is wrong: in these models the end token has the largest id.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    words: int = 49_408
    length: int = 77
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    end: int = 2

    @classmethod
    def read(cls, folder: Path) -> Size:
        """Read config.json of a CLIPTextModel or CLIPModel; ValueError for any other file."""
        from transformers import CLIPTextConfig

        config = _read_config(CLIPTextConfig, folder)
        return cls(
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            hidden=config.intermediate_size,
            words=config.vocab_size,
            length=config.max_position_embeddings,
            activation=config.hidden_act,
            epsilon=config.layer_norm_eps,
            end=config.eos_token_id,
        )


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Sizes and conventions of an image tower, by default those of ViT-L/14.

    side, patch: in pixels. embedding: dimension of the joint embedding space of images and texts.
    """

    width: int = 1024
    depth: int = 24
    heads: int = 16
    hidden: int = 4096
    side: int = 224
    patch: int = 14
    embedding: int = 768
    activation: str = "quick_gelu"
    epsilon: float = 1e-5

    @classmethod
    def read(cls, folder: Path) -> ImageSize:
        """Read config.json of a CLIPModel or CLIPVisionModelWithProjection; else ValueError."""
        from transformers import CLIPVisionConfig

        config = _read_config(CLIPVisionConfig, folder)
        # A CLIPModel has projection_dim at the top level.
        top = json.loads((folder / CONFIG).read_text())
        return cls(
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            heads=config.num_attention_heads,
            hidden=config.intermediate_size,
            side=config.image_size,
            patch=config.patch_size,
            embedding=top.get("projection_dim", config.projection_dim),
            activation=config.hidden_act,
            epsilon=config.layer_norm_eps,
        )


def _read_config(config_class: Any, folder: Path) -> Any:
    """Read a tower's transformers config; ValueError if it is unreadable or not supported."""
    try:
        config = config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, its validation and JSON raise different types
        raise ValueError(f"{folder / CONFIG} cannot be read: {error}") from error
    if config.hidden_act not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(
            f"{folder / CONFIG} has hidden_act {config.hidden_act!r}; known are {known}"
        )
    return config


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, D) -> (B, T, D); bias (1, 1, T, T) masks attention."""

    size: Size | ImageSize
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, None]:
        size = self.size
        attention = Attention(size.heads, dtype=self.dtype, name="attention")
        mlp = Mlp(size.hidden, size.width, self.dtype, ACTIVATIONS[size.activation], name="mlp")
        x = layers.constrain_batch(x)
        x = x + attention(norm(size, "norm1")(x).astype(self.dtype), bias=bias)
        return x + mlp(norm(size, "norm2")(x).astype(self.dtype)), None


def norm(size: Size | ImageSize, name: str) -> nn.LayerNorm:
    """Return a LayerNorm with scale and bias, in f32."""
    return nn.LayerNorm(size.epsilon, dtype=jnp.float32, name=name)


def blocks(size: Size | ImageSize, dtype: Any) -> nn.Module:
    """Return the scanned blocks of a tower, (x, bias) -> (x, None)."""
    stack = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=size.depth,
    )
    return stack(size, dtype, name="blocks")


class TextTower(nn.Module):
    """CLIP's text encoder: ids and mask (B, T) -> `Text`.

    tokens (B, T, D) are the outputs of the last norm, pooled is the output at the end token.
    Attention is causal and padding comes last, so padding has no effect on the other tokens.
    """

    size: Size
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> Text:
        size = self.size
        embed = partial(nn.Embed, features=size.width, dtype=self.dtype)
        x = embed(size.words, name="words")(ids)
        x = x + embed(size.length, name="positions")(jnp.arange(ids.shape[1]))
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        bias = jnp.where(causal, 0.0, jnp.finfo(jnp.float32).min)[None, None]
        x, _ = blocks(size, self.dtype)(x, bias)
        tokens = norm(size, "norm_out")(x).astype(self.dtype)
        end = jnp.argmax(ids if size.end == 2 else ids == size.end, axis=1)  # the first match
        return Text(tokens, mask, jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0])


class ImageTower(nn.Module):
    """CLIP's image encoder: `normalize`d images (B, side, side, 3) -> embeddings (B, embedding).

    The embedding is the projected output at the class token. It does not have unit length.
    """

    size: ImageSize
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        size = self.size
        dense = partial(nn.Dense, use_bias=False, dtype=self.dtype)
        x = dense(size.width, name="patch_embed")(patchify(images, size.patch))  # (B, N, D)
        token = self.param("class_embed", nn.initializers.normal(0.02), (size.width,))
        token = jnp.broadcast_to(token.astype(x.dtype), (len(x), 1, size.width))
        x = jnp.concatenate([token, x], axis=1)
        positions = nn.Embed(x.shape[1], size.width, dtype=self.dtype, name="positions")
        x = norm(size, "norm_in")(x + positions(jnp.arange(x.shape[1]))).astype(self.dtype)
        x, _ = blocks(size, self.dtype)(x, None)
        x = norm(size, "norm_out")(x[:, 0]).astype(self.dtype)
        return dense(size.embedding, name="projection")(x)


def normalize(images: jax.Array) -> jax.Array:
    """Normalize images (..., 3) in 0..255 for the image tower."""
    return (images / 255.0 - jnp.array(MEAN)) / jnp.array(DEVIATION)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """CLIP's tokenizer; it can be pickled, as needed by data worker processes."""

    backend: tokenizers.Tokenizer
    start: int
    end: int
    pad: int

    @classmethod
    def read(cls, folder: Path) -> Tokenizer:
        """Read vocab.json and merges.txt; FileNotFoundError or ValueError if missing or broken."""
        from transformers import CLIPTokenizer

        for name in WORDS:
            if not (folder / name).exists():
                raise FileNotFoundError(f"no {name} in {folder}")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises Exception itself
            raise ValueError(f"{' or '.join(WORDS)} in {folder} is broken: {error}") from error
        return cls(
            backend=tokenizer.backend_tokenizer,
            start=tokenizer.bos_token_id,
            end=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
        )

    def __call__(self, caption: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize to ids int32 and mask bool (length,): start, at most length - 2 words, end."""
        return tokenize(
            self.backend, caption, length, start=(self.start,), end=self.end, pad=self.pad
        )
