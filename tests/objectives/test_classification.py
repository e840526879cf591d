"""Accuracies of a classifier of noised images, by quarter of the timesteps."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.data.pipeline import create_source
from condiff_jax.objectives import classification
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.training.reporters import classifier
from tests import tiny

FIELDS = {
    "objective": "classification", "model.name": "unet", "model.size": "tiny",
    "data.semantics": "class", "data.classes": 10, "conditioning.control": (),
}  # fmt: skip


class Clock(nn.Module):
    """A classifier that predicts class t // 100 for any image."""

    @nn.compact
    def __call__(self, x, t):
        return jax.nn.one_hot(t // 100, 10)


@pytest.fixture(scope="module")
def objective():
    config = tiny.config(**FIELDS)
    vocabulary = create_vocabulary(config, create_source(config))
    return dataclasses.replace(classification.create(config, vocabulary), model=Clock())


def test_every_timestep_belongs_to_a_quarter(objective):
    t = jnp.array([0, 249, 250, 499, 500, 750, 999, 999])
    batch = {
        "image": jnp.zeros((8, 16, 16, 3), jnp.uint8),
        "label": jnp.array([0, 1, 2, 4, 1, 1, 9, 9]),
    }
    noise = {"t": t, "eps": jnp.zeros((8, 16, 16, 3))}
    _, parts = objective.loss({"classifier": {}}, batch, noise)
    accuracies = [float(parts[f"accuracy_{i + 1}"]) for i in range(4)]
    np.testing.assert_allclose(accuracies, [0.5, 1, 0, 1])  # two images in each quarter


def test_progress_is_measured_in_the_middle_of_each_quarter(objective, tmp_path, monkeypatch):
    """The middles are t = 125, 375, 625 and 875."""
    monkeypatch.setattr(classifier, "IMAGES", 3)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    reporter = classifier.Reporter(objective, mesh, Workdir(str(tmp_path)), {}, None)
    probabilities, *_ = reporter.measure({"classifier": {}})
    np.testing.assert_array_equal(probabilities.argmax(-1), [[n] * 3 for n in (1, 3, 6, 8)])
