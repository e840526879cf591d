"""The frozen encoders of pictures and texts: where their parameters come from, and that they fit.

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
    """The folder if it is a local one, else one with local copies of its files `names`."""
    if "://" not in os.fspath(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copies:
        for name in names:
            if (folder / name).exists():
                (Path(copies) / name).write_bytes((folder / name).read_bytes())
        yield Path(copies)


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The parameters at `autoencoder.path`, of diffusers' AutoencoderKL or VQModel."""

    path: str
    network: AutoencoderKL | AutoencoderVQ
    field: str = "autoencoder.path"

    @cached_property
    def place(self) -> epath.Path:
        """The file or folder, fetched from the hub if the path is a hub id."""
        if not self.path:
            raise ConfigError("autoencoder.path", "empty; latents need an autoencoder")
        with config_errors("autoencoder.path"):
            place = weights.locate(self.path)
            return place / "vae" if (place / "vae").is_dir() else place  # of Stable Diffusion

    def files(self) -> list[epath.Path]:
        """What the latents depend on."""
        with config_errors("autoencoder.path"):
            return weights.weight_files(self.place)

    def shapes(self) -> dict:
        """Those of the parameters."""
        side = 8 * self.network.size.factor
        image = jnp.zeros((1, side, side, 3))
        return jax.eval_shape(self.network.init, jax.random.key(0), image)["params"]

    def load(self) -> dict:
        """The parameters, f32; ConfigError where the files do not fit."""
        place = str(self.place)
        with config_errors("autoencoder.path"):
            return weights.load_published(place, key_maps.AUTOENCODER, self.shapes())


@dataclasses.dataclass(frozen=True)
class Clip:
    """CLIP's text tower at `text_encoder.path`, which nothing is read from before it is needed.

    Encodes captions like the trainable encoder: `apply({"params": ...}, ids, mask)`.
    """

    settings: TextEncoder
    dtype: Any = jnp.float32
    field: str = "text_encoder.path"

    @cached_property
    def place(self) -> epath.Path:
        """The folder, fetched from the hub if the path is a hub id."""
        if not self.settings.path:
            raise ConfigError(
                "text_encoder.path",
                "empty; text_encoder.name=clip needs a folder or a hub id such as "
                "openai/clip-vit-large-patch14",
            )
        with config_errors("text_encoder.path"):
            return weights.locate(self.settings.path, clip.CONFIG, *clip.WORDS)

    @cached_property
    def parts(self) -> tuple[epath.Path, epath.Path]:
        """The folders of the tower and of its words: one, or two within Stable Diffusion's."""
        for tower, words in (("", ""), ("text_encoder", "tokenizer")):
            if (self.place / tower / clip.CONFIG).exists():
                return self.place / tower, self.place / words
        with config_errors("text_encoder.path"):
            raise FileNotFoundError(f"no {clip.CONFIG} in {self.place}")

    @property
    def name(self) -> str:
        """What others load it by: the hub id, or the absolute path."""
        path = self.settings.path
        whole = self.parts[0] == self.place  # not a folder of Stable Diffusion's
        return path if whole and not epath.Path(path).exists() else str(self.place.resolve())

    @cached_property
    def _opened(self) -> tuple[clip.Size, clip.Tokenizer]:
        """What the small files say; ConfigError where it disagrees with the config."""
        settings, (tower, words) = self.settings, self.parts
        with (
            config_errors("text_encoder.path"),
            local(tower, (clip.CONFIG,)) as tower,
            local(words, clip.WORDS) as words,
        ):
            size, tokenizer = clip.Size.read(tower), clip.Tokenizer.read(words)
            most = max(tokenizer.backend.get_vocab().values())
            if most >= size.words or size.end not in (2, tokenizer.end):
                raise ValueError(
                    f"{clip.CONFIG} has {size.words} tokens and end token {size.end}, but "
                    f"{' and '.join(clip.WORDS)} {most + 1} and {tokenizer.end}"
                )
        for field in ("length", "width"):
            asked, found = getattr(settings, field), getattr(size, field)
            if asked != found:
                raise ConfigError(
                    f"text_encoder.{field}",
                    f"must be {found}, as in text_encoder.path={settings.path}; got {asked}",
                )
        return size, tokenizer

    @property
    def network(self) -> clip.TextTower:
        """The tower, of the size that config.json gives; ViT-L/14 is known without a path."""
        size, settings = clip.Size(), self.settings
        if settings.path or (size.length, size.width) != (settings.length, settings.width):
            size = self._opened[0]
        return clip.TextTower(size, self.dtype)

    def files(self) -> list[epath.Path]:
        """What the text features depend on, besides config.json."""
        tower, words = self.parts
        with config_errors("text_encoder.path"):
            return [*weights.weight_files(tower), *(words / name for name in clip.WORDS)]

    def shapes(self) -> dict:
        """Those of what `load` gives; ConfigError where config.json does not say."""
        ids = jnp.zeros((1, self.settings.length), jnp.int32)
        shapes = jax.eval_shape(self.network.init, jax.random.key(0), ids, ids > 0)["params"]
        return jax.eval_shape(self._cast, shapes)

    def load(self) -> dict:
        """Its parameters, matrices in the type they are computed with; ConfigError on misfit."""
        place, rules, shapes = str(self.parts[0]), key_maps.CLIP_TEXT, self.shapes()
        with config_errors("text_encoder.path"):
            params = weights.load_published(place, rules, shapes, key_maps.CLIP_OTHERS)
        return self._cast(params)

    def _cast(self, params: dict) -> dict:
        return jax.tree_util.tree_map_with_path(
            lambda path, a: a.astype(self.dtype) if path[-1].key in ("kernel", "embedding") else a,
            params,
        )

    def tokenize(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) int32 and mask (T,) bool of a caption."""
        return self._opened[1](caption, self.settings.length)

    def apply(self, variables: dict, ids: jax.Array, mask: jax.Array) -> Text:
        """Features of captions, ids and mask (B, T)."""
        return self.network.apply(variables, ids, mask)
