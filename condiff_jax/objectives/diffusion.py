"""The trainable whole: denoiser, text encoder, autoencoder and schedule of one configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax import models
from condiff_jax.conditioning.cond import Cond, Text
from condiff_jax.conditioning.control import ControlSpec, Weighting
from condiff_jax.conditioning.text import pad
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config
from condiff_jax.data.augment import SCALARS
from condiff_jax.data.pipeline import create_source
from condiff_jax.diffusion.prediction import predict_epsilon
from condiff_jax.diffusion.schedule import SCHEDULES, Schedule, rescale
from condiff_jax.models.autoencoder import Latents, Pixels
from condiff_jax.models.text_encoder import WordEmbedding, tokenize, word_tokenizer
from condiff_jax.pretrained.encoders import Autoencoder, Clip


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


def open_source(config: Config):
    """The training data; ConfigError where it cannot be read."""
    if config.data.path and config.data.name == "shapes":
        raise ConfigError(
            "data.path",
            f"is {config.data.path}, but data.name=shapes reads no files; set data.name to "
            "tfds (what mode prepare writes), webdataset or latents",
        )
    try:
        return create_source(config)
    except (OSError, ValueError) as error:
        raise ConfigError("data.path", one_line(error)) from error


def create_vocabulary(config: Config, source) -> Vocabulary:
    """The words and classes of a data source, as far as the config uses them."""
    if config.data.semantics == "class":
        found, expected = len(source.classes), config.data.classes
        if expected and found != expected:
            raise ConfigError("data.classes", f"is {expected}, but the data has {found} classes")
        return Vocabulary((), tuple(source.classes))
    words = () if config.text_encoder.name == "clip" else source.vocabulary()
    return Vocabulary(tuple(words), ())


class Trainable:
    """What is trained: a frozen dataclass with these fields and methods.

    init(key): its fresh parameters by network; frozen: where parameters that are not trained come
    from, by network.
    """

    config: Config
    frozen: dict
    init: Callable[[jax.Array], dict]

    @cached_property
    def shapes(self) -> dict:
        """The parameters' shapes and types; tracing `init` for them takes seconds."""
        return jax.eval_shape(self.init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class Noising(Trainable):
    """What all networks of noised pictures have: data, latents and noise levels of a config."""

    config: Config
    vocabulary: Vocabulary
    model: nn.Module
    text_encoder: WordEmbedding | Clip | None
    autoencoder: Pixels | Latents
    schedule: Schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of what the denoiser sees."""
        side = self.config.data.resolution // self.autoencoder.factor
        return side, side, self.autoencoder.channels

    def example(self, batch: int) -> dict[str, Any]:
        """A batch of zeros with the shapes and types that pictures and requests have."""
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

    @cached_property
    def frozen(self) -> dict[str, Autoencoder | Clip]:
        """Where the parameters that are not trained come from, by network; {} if all are."""
        out = {}
        if isinstance(self.autoencoder, Latents):
            out["autoencoder"] = Autoencoder(self.config.autoencoder.path, self.autoencoder.network)
        if isinstance(self.text_encoder, Clip):
            out["text_encoder"] = self.text_encoder
        return out

    def load_frozen(self) -> dict:
        """The parameters that are not trained, by network; ConfigError where there are none."""
        return {name: encoder.load() for name, encoder in self.frozen.items()}

    def clean(self, params: dict, batch: dict, noise: jax.Array | None) -> jax.Array:
        """x_0 (B, H, W, C) of a batch; noise of that shape is for latents, which are drawn."""
        if "moments" in batch:  # coded once and for all by mode encode
            return self.autoencoder.sample(batch["moments"], noise)
        return self.autoencoder.encode(params.get("autoencoder"), batch["image"], noise)


@dataclasses.dataclass(frozen=True)
class System(Noising):
    """Networks of one configuration, and the parameters by network that they have.

    Trained: "model" and, unless it is frozen, "text_encoder" (`init`); frozen: that and
    "autoencoder", as far as they are used (`load_frozen`). Methods take both in one dictionary.
    """

    control: ControlSpec

    def encode_text(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T,) int32 and mask (T,) bool of a caption."""
        if isinstance(self.text_encoder, Clip):
            return self.text_encoder.tokenize(caption)
        return tokenize(self.vocabulary.tokenizer, caption, self.config.text_encoder.length)

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters of what is trained, f32."""
        keys = jax.random.split(key)
        batch, params = self.example(1), {}
        if isinstance(self.text_encoder, WordEmbedding):
            variables = self.text_encoder.init(keys[0], batch["ids"], batch["mask"])
            params["text_encoder"] = variables["params"]
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,), jnp.int32)
        params["model"] = self.model.init(keys[1], x, t, self.example_cond())["params"]
        return params

    def example_cond(self) -> Cond:
        """What `condition` makes of `example(1)`, but with all features zero."""
        batch, text = self.example(1), self.config.text_encoder
        semantics = jnp.asarray(batch["label"])
        if self.text_encoder is not None:
            dtype = jnp.dtype(self.config.model.dtype)
            tokens = jnp.zeros((1, text.length, text.width), dtype)
            semantics = Text(tokens, jnp.asarray(batch["mask"]), tokens[:, 0])
        return Cond.of(semantics, self.control.control(batch["control"]))

    def condition(self, params: dict, batch: dict, text_noise: jax.Array | None) -> Cond:
        """The full condition of a batch; text_noise (B, T, C) is eps of Eq. 7, None for classes."""
        semantics = batch["label"]
        if self.text_encoder is not None:
            if "tokens" in batch:  # coded once and for all by mode encode
                dtype = jnp.dtype(self.config.model.dtype)
                tokens, pooled = (batch[name].astype(dtype) for name in ("tokens", "pooled"))
                text = Text(tokens, batch["mask"], pooled)
            else:
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


def _text_encoder(config: Config, vocabulary: Vocabulary) -> WordEmbedding | Clip | None:
    dtype = jnp.dtype(config.model.dtype)
    if config.data.semantics != "text":
        return None
    if config.text_encoder.name == "clip":
        return Clip(config.text_encoder, dtype)
    words = vocabulary.tokenizer.get_vocab_size()
    return WordEmbedding(words, config.text_encoder.width, dtype)


def create_noising(config: Config) -> tuple[Pixels | Latents, Schedule]:
    """The space that diffusion runs in, and its noise levels (Eq. 3)."""
    diffusion = config.diffusion
    betas = (diffusion.beta_start, diffusion.beta_end)
    schedule = SCHEDULES[diffusion.schedule](diffusion.timesteps, *betas)
    if diffusion.base_resolution:
        schedule = rescale(schedule, diffusion.base_resolution, config.data.resolution)
    settings = config.autoencoder
    if settings.name != "pixels":
        return Latents.create(config), schedule
    return Pixels(settings.scale, settings.shift), schedule


def create(config: Config, vocabulary: Vocabulary) -> System:
    """Build the modules; nothing is allocated, and nothing of frozen encoders read.

    ConfigError where `config.objective` asks for something else than diffusion.
    """
    if config.objective != "diffusion":
        raise ConfigError(
            "objective",
            f"{config.objective} has no denoiser: its only mode is train",
        )
    autoencoder, schedule = create_noising(config)
    settings = config.conditioning
    weighting = Weighting.create(
        settings.weighting, alpha=settings.alpha, k=settings.k, sigma=schedule.sigma
    )
    text = config.data.semantics == "text"
    return System(
        config=config,
        vocabulary=vocabulary,
        model=models.create(
            config,
            classes=None if text else len(vocabulary.classes),
            weighting=weighting,
            factor=autoencoder.factor,
        ),
        text_encoder=_text_encoder(config, vocabulary),
        autoencoder=autoencoder,
        schedule=schedule,
        control=ControlSpec(settings.control),
    )
