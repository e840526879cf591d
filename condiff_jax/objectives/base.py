"""Base classes of training objectives."""

from __future__ import annotations

import abc
import dataclasses
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from condiff_jax.conditioning.control import scalar_names
from condiff_jax.config.schema import Config
from condiff_jax.diffusion.schedule import SCHEDULES, Schedule, rescale
from condiff_jax.models.autoencoder import Latents, Pixels
from condiff_jax.models.text_encoder import WordEmbedding
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained.encoders import Autoencoder, Clip


class Objective(abc.ABC):
    """A training objective: a frozen dataclass of modules; methods take parameters by network.

    config: the configuration. frozen: loaders of the parameters that are not trained, by network.
    """

    config: Config
    frozen: dict[str, Any]

    @abc.abstractmethod
    def init(self, key: jax.Array) -> dict:
        """Initialize the trained parameters, f32, by network."""

    @abc.abstractmethod
    def draw_noise(self, key: jax.Array, batch: int, step: jax.Array | int = 0) -> dict:
        """Draw all random inputs of a step: arrays (B, ...), each from its own key."""

    @abc.abstractmethod
    def loss(
        self, params: dict, batch: dict, noise: dict, frozen: dict | None = None
    ) -> tuple[jax.Array, dict]:
        """Return (mean loss of a batch (), its terms by name); frozen: parameters not trained."""

    @abc.abstractmethod
    def forward_flops(self) -> int:
        """Count the FLOPs of the trained network for one image, multiply-add = 2."""

    def load_frozen(self) -> dict:
        """Load the parameters that are not trained, by network; ConfigError if they are missing."""
        return {name: encoder.load() for name, encoder in self.frozen.items()}

    @cached_property
    def shapes(self) -> dict:
        """Shapes and dtypes of the trained parameters; cached, as tracing `init` takes seconds."""
        return jax.eval_shape(self.init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class NoisedObjective(Objective):
    """An objective on noised images: a model, a latent or pixel space, and noise levels."""

    config: Config
    vocabulary: Vocabulary
    model: nn.Module
    text_encoder: WordEmbedding | Clip | None
    autoencoder: Pixels | Latents
    schedule: Schedule

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (H, W, C) of the model's input."""
        side = self.config.data.resolution // self.autoencoder.factor
        return side, side, self.autoencoder.channels

    def example(self, batch: int) -> dict[str, Any]:
        """A batch of zeros with the shapes and dtypes of training batches."""
        side, length = self.config.data.resolution, self.config.text_encoder.length
        names = scalar_names(bool(self.config.data.color))
        out = {
            "image": np.zeros((batch, side, side, 3), np.uint8),
            "label": np.zeros((batch,), np.int32),
            "control": {name: np.zeros((batch,), np.float32) for name in names},
            "broken": np.zeros((batch,), np.int32),
        }
        if self.text_encoder is not None:
            out["ids"] = np.zeros((batch, length), np.int32)
            out["mask"] = np.ones((batch, length), bool)
        return out

    @cached_property
    def frozen(self) -> dict[str, Autoencoder | Clip]:
        """Loaders of the parameters that are not trained, by network; {} if all are trained."""
        out = {}
        if isinstance(self.autoencoder, Latents):
            out["autoencoder"] = Autoencoder(self.config.autoencoder.path, self.autoencoder.network)
        if isinstance(self.text_encoder, Clip):
            out["text_encoder"] = self.text_encoder
        return out

    def clean(self, params: dict, batch: dict, noise: jax.Array | None) -> jax.Array:
        """x_0 (B, H, W, C) of a batch; noise of that shape samples latents, None for pixels."""
        if "moments" in batch:  # cached by mode encode
            return self.autoencoder.sample(batch["moments"], noise)
        return self.autoencoder.encode(params.get("autoencoder"), batch["image"], noise)


def create_space_and_schedule(config: Config) -> tuple[Pixels | Latents, Schedule]:
    """Create the space that diffusion runs in and its noise levels (Eq. 3)."""
    diffusion = config.diffusion
    betas = (diffusion.beta_start, diffusion.beta_end)
    schedule = SCHEDULES[diffusion.schedule](diffusion.timesteps, *betas)
    if diffusion.base_resolution:
        schedule = rescale(schedule, diffusion.base_resolution, config.data.resolution)
    settings = config.autoencoder
    if settings.name != "pixels":
        return Latents.create(config), schedule
    return Pixels(settings.scale, settings.shift), schedule
