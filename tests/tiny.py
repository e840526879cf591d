"""A small configuration for tests: 4 x 4 image tokens, and a tiny model with `few_layers`."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.config.schema import Config
from condiff_jax.data.pipeline import create_source
from condiff_jax.evaluation.evaluate import Evaluation
from condiff_jax.models import transformer
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints, abstract_state
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.training import loop
from configs import base


def values(**overrides):
    """The ConfigDict with overrides by dotted name."""
    config = base.get_config()
    config.steps = 4
    config.batch_size = 16
    config.model.size = "tiny/4"
    config.data.resolution = 16
    config.text_encoder.length = 8
    config.text_encoder.width = 16
    config.optimizer.learning_rate = 1e-3
    config.sampling.steps = 3
    config.sampling.n = 4
    config.sampling.control_guidance = 1.375
    config.checkpoint.every = 2
    config.log.every = 2
    config.log.samples_every = 0
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def config(**overrides) -> Config:
    """The validated configuration, see `values`."""
    return create_config(values(**overrides))


def objective(config: Config) -> diffusion.DiffusionObjective:
    """The objective of a config, with the vocabulary of its data."""
    return diffusion.create(config, create_vocabulary(config, create_source(config)))


def evaluation(config: Config, path: Path | str = "no such folder") -> Evaluation:
    """The evaluation of a config for the run in a folder."""
    return Evaluation.create(config, Workdir(str(path)), sharding.create_mesh())


@contextlib.contextmanager
def few_layers() -> Iterator[None]:
    """Patch the tiny size to two layers of width 32, and apply `random_start`."""
    with mock.patch.dict(transformer.SIZES, {"tiny": (2, 32, 2)}), random_start():
        yield


@contextlib.contextmanager
def random_start() -> Iterator[None]:
    """Patch the start of training: random parameters by numpy, and only 16 control values.

    Compiling `init` takes longer than a run of a few steps.
    """

    def compile_step(objective, mesh):
        return partial(start, objective, mesh), original(objective, mesh)[1]

    def start(objective, mesh, key):
        shapes = abstract_state(objective, mesh)
        params = random_params(shapes.params, int(jax.random.key_data(key).sum()))
        zeros = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
        values = zeros.replace(params=params, ema=params)
        return jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), values, shapes)

    original = loop.compile_step
    few = partial(loop.first_controls, n=16)
    with (
        mock.patch.object(loop, "compile_step", compile_step),
        mock.patch.object(loop, "first_controls", few),
    ):
        yield


def random_params(shapes, seed: int = 0):
    """Random arrays with standard deviation 0.2; none is zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.2, a.shape).astype(a.dtype), shapes)


def finished(config: Config, path: Path) -> dict:
    """Write a finished run with random parameters to `path`, and return the parameters."""
    created = objective(config)
    folder = Workdir(str(path))
    folder.open(config, created.vocabulary)
    params = random_params(created.shapes)
    train_state = state.create(params, optimizer.create(config))
    train_state = train_state.replace(step=jnp.array(config.steps))
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    checkpoints.save(config.steps, train_state, 0.0)
    checkpoints.close()
    return params
