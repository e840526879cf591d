"""Frozen encoders of images and texts, loaded from published weights and checked for fit.

Their parameters are not in the training state: `Objective.load_frozen` reads them at every start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from condiff_jax.conditioning.cond import Text
from condiff_jax.config.errors import ConfigError, config_errors
from condiff_jax.config.schema import TextEncoder
from condiff_jax.models import clip
from condiff_jax.models.kl import AutoencoderKL
from condiff_jax.models.vq import AutoencoderVQ
from condiff_jax.pretrained import key_maps, weights


@contextlib.contextmanager
def local(folder: epath.Path, names: Sequence[str]):
    """Yield a local folder with the files `names`: the folder itself or, if remote, copies."""
    if "://" not in os.fspath(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            if (folder / name).exists():
                (Path(directory) / name).write_bytes((folder / name).read_bytes())
        yield Path(directory)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Parameters at `autoencoder.path`, of diffusers' AutoencoderKL or VQModel."""

    path: str
    network: AutoencoderKL | AutoencoderVQ
    field: str = "autoencoder.path"

    @cached_property
    def location(self) -> epath.Path:
        """File or folder of the weights, downloaded if the path is a hub id."""
        if not self.path:
            raise ConfigError("autoencoder.path", "empty; latents need an autoencoder")
        with config_errors("autoencoder.path"):
            location = weights.locate(self.path)
            # Stable Diffusion's repositories have the autoencoder in the subfolder vae.
            return location / "vae" if (location / "vae").is_dir() else location

    def files(self) -> list[epath.Path]:
        """List the files that determine the latents."""
        with config_errors("autoencoder.path"):
            return weights.weight_files(self.location)

    def shapes(self) -> dict:
        """Shapes of the parameters."""
        side = 8 * self.network.size.factor
        image = jnp.zeros((1, side, side, 3))
        return jax.eval_shape(self.network.init, jax.random.key(0), image)["params"]

    def load(self) -> dict:
        """Load the parameters, f32; ConfigError if the files do not fit."""
        source = str(self.location)
        with config_errors("autoencoder.path"):
            return weights.load_published(source, key_maps.AUTOENCODER, self.shapes())


@dataclasses.dataclass(frozen=True)
class Clip:
    """CLIP's text tower at `text_encoder.path`; files are read when first needed.

    It encodes captions like the trainable encoder: `apply({"params": ...}, ids, mask)`.
    """

    settings: TextEncoder
    dtype: Any = jnp.float32
    field: str = "text_encoder.path"

    @cached_property
    def location(self) -> epath.Path:
        """Folder of the checkpoint, downloaded if the path is a hub id."""
        if not self.settings.path:
            raise ConfigError(
                "text_encoder.path",
                "empty; text_encoder.name=clip needs a folder or a hub id such as "
                "openai/clip-vit-large-patch14",
            )
        with config_errors("text_encoder.path"):
            return weights.locate(self.settings.path, clip.CONFIG, *clip.WORDS)

    @cached_property
    def folders(self) -> tuple[epath.Path, epath.Path]:
        """Folders of the tower and of the tokenizer: the same, or two subfolders.

        Stable Diffusion's repositories have the subfolders text_encoder and tokenizer.
        """
        for tower, tokenizer in (("", ""), ("text_encoder", "tokenizer")):
            if (self.location / tower / clip.CONFIG).exists():
                return self.location / tower, self.location / tokenizer
        with config_errors("text_encoder.path"):
            raise FileNotFoundError(f"no {clip.CONFIG} in {self.location}")

    @property
    def name(self) -> str:
        """Name by which transformers loads the checkpoint: a hub id or an absolute path."""
        path = self.settings.path
        in_subfolder = self.folders[0] != self.location
        if in_subfolder or epath.Path(path).exists():
            return str(self.location.resolve())
        return path

    @cached_property
    def _size_and_tokenizer(self) -> tuple[clip.Size, clip.Tokenizer]:
        """Size and tokenizer from the files; ConfigError if they do not fit the config."""
        settings = self.settings
        tower, words = self.folders
        with (
            config_errors("text_encoder.path"),
            local(tower, (clip.CONFIG,)) as tower,
            local(words, clip.WORDS) as words,
        ):
            size = clip.Size.read(tower)
            tokenizer = clip.Tokenizer.read(words)
            max_id = max(tokenizer.backend.get_vocab().values())
            if max_id >= size.words or size.end not in (2, tokenizer.end):
                raise ValueError(
                    f"{clip.CONFIG} has {size.words} tokens and end token {size.end}, but "
                    f"{' and '.join(clip.WORDS)} {max_id + 1} and {tokenizer.end}"
                )
        for field in ("length", "width"):
            configured = getattr(settings, field)
            actual = getattr(size, field)
            if configured != actual:
                raise ConfigError(
                    f"text_encoder.{field}",
                    f"must be {actual}, as in text_encoder.path={settings.path}; got {configured}",
                )
        return size, tokenizer

    @property
    def network(self) -> clip.TextTower:
        """Tower of the size in config.json; without a path, ViT-L/14 if length and width fit."""
        settings = self.settings
        size = clip.Size()
        if settings.path or (size.length, size.width) != (settings.length, settings.width):
            size, _ = self._size_and_tokenizer
        return clip.TextTower(size, self.dtype)

    def files(self) -> list[epath.Path]:
        """List the files that determine the text features, besides config.json."""
        tower, words = self.folders
        with config_errors("text_encoder.path"):
            return [*weights.weight_files(tower), *(words / name for name in clip.WORDS)]

    def shapes(self) -> dict:
        """Shapes and dtypes of the parameters; ConfigError if config.json does not fit."""
        ids = jnp.zeros((1, self.settings.length), jnp.int32)
        shapes = jax.eval_shape(self.network.init, jax.random.key(0), ids, ids > 0)["params"]
        return jax.eval_shape(self._cast, shapes)

    def load(self) -> dict:
        """Load the parameters, matrices in the compute dtype; ConfigError if files do not fit."""
        source, rules = str(self.folders[0]), key_maps.CLIP_TEXT
        shapes = self.shapes()
        with config_errors("text_encoder.path"):
            params = weights.load_published(source, rules, shapes, key_maps.CLIP_TEXT_IGNORED)
        return self._cast(params)

    def _cast(self, params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, a: a.astype(self.dtype) if path[-1].key in ("kernel", "embedding") else a,
            params,
        )

    def tokenize(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a caption to ids (T,) int32 and mask (T,) bool."""
        _, tokenizer = self._size_and_tokenizer
        return tokenizer(caption, self.settings.length)

    def apply(self, variables: dict, ids: jax.Array, mask: jax.Array) -> Text:
        """Encode captions given as ids and mask (B, T)."""
        return self.network.apply(variables, ids, mask)
