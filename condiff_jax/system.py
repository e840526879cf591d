"""The trainable whole: denoiser, text encoder, autoencoder and schedule of one configuration."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax import models
from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.control import ControlSpec, Weighting
from condiff_jax.conditioning.text import pad
from condiff_jax.config import Config, ConfigError
from condiff_jax.convert import published, weights
from condiff_jax.data.augment import SCALARS
from condiff_jax.diffusion.prediction import predict_epsilon
from condiff_jax.diffusion.schedule import SCHEDULES, Schedule, rescale
from condiff_jax.models.autoencoder import Latents, Pixels
from condiff_jax.models.text_encoder import WordEmbedding, tokenize, word_tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a data set talks about; kept in the work directory as vocabulary.json."""

    words: tuple[str, ...]
    classes: tuple[str, ...]

    def to_json(self) -> str:
        """The text of vocabulary.json."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Inverse of `to_json`."""
        return cls(**{key: tuple(value) for key, value in json.loads(text).items()})

    @cached_property
    def tokenizer(self):
        """Word-level tokenizer over `words`."""
        return word_tokenizer(self.words)


@dataclasses.dataclass(frozen=True)
class System:
    """Modules of one configuration; parameters are {"model": ..., "text_encoder": ...}."""

    config: Config
    vocabulary: Vocabulary
    model: nn.Module
    text_encoder: nn.Module | None
    autoencoder: Pixels | Latents
    schedule: Schedule
    control: ControlSpec

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the denoiser sees."""
        side = self.config.data.resolution // self.autoencoder.factor
        return side, side, self.autoencoder.channels

    def encode_text(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) int32 and mask (T,) bool of a caption."""
        return tokenize(self.vocabulary.tokenizer, caption, self.config.text_encoder.length)

    def example(self, batch: int) -> dict[str, Any]:
        """A batch of zeros with the shapes and types that data and requests have."""
        side, length = self.config.data.resolution, self.config.text_encoder.length
        out = {
            "image": np.zeros((batch, side, side, 3), np.uint8),
            "label": np.zeros((batch,), np.int32),
            "control": {name: np.zeros((batch,), np.float32) for name in SCALARS},
            "broken": np.zeros((batch,), np.int32),
        }
        if self.text_encoder is not None:
            out["ids"] = np.zeros((batch, length), np.int32)
            out["mask"] = np.ones((batch, length), bool)
        return out

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters, f32."""
        keys = jax.random.split(key)
        batch = self.example(1)
        params, semantics = {}, batch["label"]
        if self.text_encoder is not None:
            variables = self.text_encoder.init(keys[0], batch["ids"], batch["mask"])
            params["text_encoder"] = variables["params"]
            semantics = self.text_encoder.apply(variables, batch["ids"], batch["mask"])
        cond = Cond.of(semantics, self.control.control(batch["control"]))
        x = jnp.zeros((1, *self.latent_shape))
        params["model"] = self.model.init(keys[1], x, jnp.zeros((1,), jnp.int32), cond)["params"]
        return params

    def load_frozen(self) -> dict | None:
        """Parameters of the autoencoder from `autoencoder.path`, None in pixel space."""
        if isinstance(self.autoencoder, Pixels):
            return None
        name, path = self.config.autoencoder.name, self.config.autoencoder.path
        if not path:
            raise ConfigError(
                f"config: autoencoder.path is empty; autoencoder.name={name} needs one"
            )
        image = jnp.zeros((1, 8 * self.autoencoder.factor, 8 * self.autoencoder.factor, 3))
        shapes = jax.eval_shape(self.autoencoder.network.init, jax.random.key(0), image)["params"]
        try:
            return weights.load_published(path, published.AUTOENCODER, shapes)
        except (OSError, ValueError) as error:
            raise ConfigError(f"autoencoder.path: {error}") from error

    def condition(self, params: dict, batch: dict, text_noise: jax.Array | None) -> Cond:
        """The full condition of a batch; text_noise (B, T, C) is eps of Eq. 7, None for classes."""
        semantics = batch["label"]
        if self.text_encoder is not None:
            variables = {"params": params["text_encoder"]}
            text = self.text_encoder.apply(variables, batch["ids"], batch["mask"])
            settings = self.config.conditioning
            semantics = pad(text, settings.padding, beta=settings.beta_txt, noise=text_noise)
        return Cond.of(semantics, self.control.control(batch["control"]))

    def denoise(self, params: dict, **inputs):
        """denoise(x, t, cond) -> eps with these parameters; inputs: others that the model takes."""

        def network(x, t, cond):
            return self.model.apply({"params": params["model"]}, x, t, cond, **inputs)

        return predict_epsilon(network, self.schedule, self.config.diffusion.prediction)


def create(config: Config, vocabulary: Vocabulary) -> System:
    """Build the modules; nothing is allocated."""
    diffusion = config.diffusion
    betas = (diffusion.beta_start, diffusion.beta_end)
    schedule = SCHEDULES[diffusion.schedule](diffusion.timesteps, *betas)
    if diffusion.base_resolution:
        schedule = rescale(schedule, diffusion.base_resolution, config.data.resolution)
    settings = config.autoencoder
    autoencoder = Pixels(settings.scale, settings.shift)
    if settings.name != "pixels":
        autoencoder = Latents.create(config)
    settings = config.conditioning
    weighting = Weighting.create(
        settings.weighting, alpha=settings.alpha, k=settings.k, sigma=schedule.sigma
    )
    text = config.data.semantics == "text"
    encoder = None
    if text:
        encoder = WordEmbedding(
            vocabulary=vocabulary.tokenizer.get_vocab_size(),
            width=config.text_encoder.width,
            dtype=jnp.dtype(config.model.dtype),
        )
    return System(
        config=config,
        vocabulary=vocabulary,
        model=models.create(
            config,
            classes=None if text else len(vocabulary.classes),
            weighting=weighting,
            factor=autoencoder.factor,
        ),
        text_encoder=encoder,
        autoencoder=autoencoder,
        schedule=schedule,
        control=ControlSpec(settings.control),
    )
