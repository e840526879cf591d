"""A configuration small enough for tests: 4 x 4 image tokens, with `few_layers` a tiny model."""

from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax import config as config_lib
from condiff_jax import optim, state
from condiff_jax import system as system_lib
from condiff_jax.checkpoint import Checkpoints
from condiff_jax.data.pipeline import create_source
from condiff_jax.models import transformer
from condiff_jax.workdir import Workdir
from configs import base


def values(**overrides):
    """The ConfigDict, with overrides by dotted name."""
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


def config(**overrides) -> config_lib.Config:
    """The validated configuration."""
    return config_lib.create(values(**overrides))


def system(config: config_lib.Config) -> system_lib.System:
    """Its modules, on the vocabulary of its data."""
    return system_lib.create(config, system_lib.create_vocabulary(config, create_source(config)))


def few_layers():
    """Patches the tiny size to two layers of width 32: the machinery needs no more."""
    return mock.patch.dict(transformer.SIZES, {"tiny": (2, 32, 2)})


def finished(config: config_lib.Config, path: Path) -> dict:
    """Makes `path` the folder of a finished training with random parameters; these."""
    own, folder = system(config), Workdir(str(path))
    folder.open(config, own.vocabulary)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32),
        jax.eval_shape(own.init, jax.random.key(0)),
    )
    train_state = state.create(params, optim.create(config))
    train_state = train_state.replace(step=jnp.array(config.steps))
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    checkpoints.save(config.steps, train_state, 0.0)
    checkpoints.close()
    return params
