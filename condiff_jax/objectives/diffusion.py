"""The diffusion objective: denoiser, text encoder, autoencoder and schedule of a config."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax import models
from condiff_jax.conditioning.cond import Cond, Text
from condiff_jax.conditioning.control import ControlSpec, Weighting
from condiff_jax.conditioning.dropout import drop_flags
from condiff_jax.conditioning.text import PADDINGS, pad
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.diffusion.loss import denoising_loss, draw_timesteps
from condiff_jax.diffusion.prediction import loss_weight, predict_epsilon
from condiff_jax.models.autoencoder import Latents
from condiff_jax.models.mdt import MDT, hide
from condiff_jax.models.text_encoder import WordEmbedding, tokenize
from condiff_jax.objectives.base import NoisedObjective, create_space_and_schedule
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained.encoders import Clip
from condiff_jax.runtime import flops


@dataclasses.dataclass(frozen=True)
class DiffusionObjective(NoisedObjective):
    """The objective of a denoiser.

    Trained parameters (`init`): "model" and, for words, "text_encoder". Frozen ones
    (`load_frozen`): "text_encoder" for CLIP, and "autoencoder" for latents. Methods take trained
    and frozen parameters in one dictionary.
    """

    control: ControlSpec

    def encode_text(self, caption: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokenize a caption: ids (T,) int32 and mask (T,) bool."""
        if isinstance(self.text_encoder, Clip):
            return self.text_encoder.tokenize(caption)
        return tokenize(self.vocabulary.tokenizer, caption, self.config.text_encoder.length)

    def init(self, key: jax.Array) -> dict:
        """See `Objective.init`."""
        keys = jax.random.split(key)
        batch = self.example(1)
        params = {}
        if isinstance(self.text_encoder, WordEmbedding):
            variables = self.text_encoder.init(keys[0], batch["ids"], batch["mask"])
            params["text_encoder"] = variables["params"]
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,), jnp.int32)
        params["model"] = self.model.init(keys[1], x, t, self.example_cond())["params"]
        return params

    def example_cond(self) -> Cond:
        """The condition of `example(1)` with all features zero."""
        batch, text = self.example(1), self.config.text_encoder
        semantics = jnp.asarray(batch["label"])
        if self.text_encoder is not None:
            dtype = jnp.dtype(self.config.model.dtype)
            tokens = jnp.zeros((1, text.length, text.width), dtype)
            semantics = Text(tokens, jnp.asarray(batch["mask"]), tokens[:, 0])
        return Cond.of(semantics, self.control.control(batch["control"]))

    def condition(self, params: dict, batch: dict, text_noise: jax.Array | None) -> Cond:
        """Conditioning inputs of a batch; text_noise (B, T, C): eps of Eq. 7, None for classes."""
        semantics = batch["label"]
        if self.text_encoder is not None:
            if "tokens" in batch:  # cached by mode encode
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
        """Return the function (x, t, cond) -> eps; inputs: further inputs of the model."""

        def network(x, t, cond):
            return self.model.apply({"params": params["model"]}, x, t, cond, **inputs)

        return predict_epsilon(network, self.schedule, self.config.diffusion.prediction)

    def draw_noise(self, key: jax.Array, batch: int, step: jax.Array | int = 0) -> dict:
        """See `Objective.draw_noise`; step is not used."""
        settings = self.config.conditioning
        key_t, key_eps, key_drop, key_text, key_hide, key_latent = jax.random.split(key, 6)
        drop_semantics, drop_control = drop_flags(
            key_drop, batch, settings.drop_semantics, settings.drop_control, settings.drop_mode
        )
        noise = {
            "t": draw_timesteps(key_t, batch, self.schedule.timesteps),
            "eps": jax.random.normal(key_eps, (batch, *self.latent_shape)),
            "drop_semantics": drop_semantics,
            "drop_control": drop_control,
        }
        if self.text_encoder is not None and PADDINGS[settings.padding].noise:
            text = self.config.text_encoder
            noise["text"] = jax.random.normal(key_text, (batch, text.length, text.width))
        if isinstance(self.autoencoder, Latents):
            noise["latent"] = jax.random.normal(key_latent, (batch, *self.latent_shape))
        if isinstance(self.model, MDT) and self.model.mask_ratio:
            tokens = math.prod(self.latent_shape[:2]) // self.model.patch**2
            noise["hidden"] = hide(key_hide, batch, tokens, self.model.mask_ratio)
        return noise

    def loss(
        self, params: dict, batch: dict, noise: dict, frozen: dict | None = None
    ) -> tuple[jax.Array, dict]:
        """Weighted mean square error of the prediction; MDTv2 adds that of its masked pass."""
        params = {**params, **(frozen or {})}
        cond: Cond = self.condition(params, batch, noise.get("text"))
        cond = cond.replace(
            drop_semantics=noise["drop_semantics"], drop_control=noise["drop_control"]
        )
        x0 = self.clean(params, batch, noise.get("latent"))
        inputs = (self.schedule, x0, noise["t"], noise["eps"], cond)
        loss = denoising_loss(self.denoise(params), *inputs)
        if "hidden" in noise:
            loss = loss + denoising_loss(self.denoise(params, hidden=noise["hidden"]), *inputs)
        weight = loss_weight(self.schedule, noise["t"], self.config.diffusion.prediction)
        return (weight * loss).mean(), {}

    def forward_flops(self) -> int:
        """Count the FLOPs of the denoiser for one image, multiply-add = 2, without encoders."""
        # FLOPs inside the kernels of other attention backends are not counted.
        objective = dataclasses.replace(self, model=self.model.clone(backend="xla"))
        x = jax.ShapeDtypeStruct((1, *self.latent_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        cond = jax.eval_shape(self.example_cond)
        return flops.count(
            lambda params, *inputs: objective.denoise(params)(*inputs), self.shapes, x, t, cond
        )


def _text_encoder(config: Config, vocabulary: Vocabulary) -> WordEmbedding | Clip | None:
    dtype = jnp.dtype(config.model.dtype)
    if config.data.semantics != "text":
        return None
    if config.text_encoder.name == "clip":
        return Clip(config.text_encoder, dtype)
    words = vocabulary.tokenizer.get_vocab_size()
    return WordEmbedding(words, config.text_encoder.width, dtype)


def create(config: Config, vocabulary: Vocabulary) -> DiffusionObjective:
    """Create the objective; nothing is allocated, and no files of frozen encoders are read.

    Raises ConfigError if `config.objective` is not diffusion.
    """
    if config.objective != "diffusion":
        raise ConfigError(
            "objective",
            f"{config.objective} has no denoiser: its only mode is train",
        )
    autoencoder, schedule = create_space_and_schedule(config)
    settings = config.conditioning
    weighting = Weighting.create(
        settings.weighting, alpha=settings.alpha, k=settings.k, sigma=schedule.sigma
    )
    text = config.data.semantics == "text"
    return DiffusionObjective(
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
