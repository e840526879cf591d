"""The objective of classifiers for guidance (arXiv:2105.05233, App. H).

The loss is cross-entropy on images noised as for a denoiser, at uniform t.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from condiff_jax import models
from condiff_jax.config.schema import Config
from condiff_jax.diffusion.loss import add_noise, draw_timesteps
from condiff_jax.models.autoencoder import Latents
from condiff_jax.objectives.base import NoisedObjective, create_space_and_schedule
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.runtime import flops

QUARTERS = 4  # intervals of 0..T-1 for which accuracy is reported


@dataclasses.dataclass(frozen=True)
class ClassificationObjective(NoisedObjective):
    """The objective of a classifier; its parameters are {"classifier": ...}."""

    def init(self, key: jax.Array) -> dict:
        """See `Objective.init`."""
        x, t = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1,), jnp.int32)
        return {"classifier": self.model.init(key, x, t)["params"]}

    def draw_noise(self, key: jax.Array, batch: int, step: jax.Array | int = 0) -> dict:
        """See `Objective.draw_noise`; step is not used."""
        key_t, key_eps, key_latent = jax.random.split(key, 3)
        shape = (batch, *self.latent_shape)
        noise = {
            "t": draw_timesteps(key_t, batch, self.schedule.timesteps),
            "eps": jax.random.normal(key_eps, shape),
        }
        if isinstance(self.autoencoder, Latents):
            noise["latent"] = jax.random.normal(key_latent, shape)
        return noise

    def predict(self, params: dict, batch: dict, noise: dict) -> tuple[jax.Array, jax.Array]:
        """Return (logits (B, classes), x_t (B, H, W, C)); params: trained and frozen ones."""
        x = self.clean(params, batch, noise.get("latent"))
        x = add_noise(self.schedule, x, noise["t"], noise["eps"])
        return self.model.apply({"params": params["classifier"]}, x, noise["t"]), x

    def loss(
        self, params: dict, batch: dict, noise: dict, frozen: dict | None = None
    ) -> tuple[jax.Array, dict]:
        """Mean cross-entropy (), nats, and accuracy, overall and by quarter of the timesteps.

        Each quarter is counted as B / 4 images: exact if 4 divides B, see `draw_timesteps`.
        """
        logits, _ = self.predict({**params, **(frozen or {})}, batch, noise)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        correct = logits.argmax(-1) == batch["label"]
        quarter = QUARTERS * noise["t"] // self.schedule.timesteps
        parts = {"accuracy": correct.mean()}
        for i in range(QUARTERS):
            parts[f"accuracy_{i + 1}"] = QUARTERS * (correct & (quarter == i)).mean()
        return losses.mean(), parts

    def forward_flops(self) -> int:
        """Count the FLOPs of the classifier for one image, multiply-add = 2."""
        network = self.model.clone(backend="xla")
        x = jax.ShapeDtypeStruct((1, *self.latent_shape), jnp.float32)
        t = jax.ShapeDtypeStruct((1,), jnp.int32)
        return flops.count(
            lambda params, *inputs: network.apply({"params": params}, *inputs),
            self.shapes["classifier"], x, t,
        )  # fmt: skip


def create(config: Config, vocabulary: Vocabulary) -> ClassificationObjective:
    """Create the objective; nothing is allocated."""
    network = models.create_classifier(config, classes=len(vocabulary.classes))
    return ClassificationObjective(
        config, vocabulary, network, None, *create_space_and_schedule(config)
    )
