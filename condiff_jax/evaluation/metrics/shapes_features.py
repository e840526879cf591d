"""A small classifier of `shapes` pictures, whose features the Frechet distance compares.

Its weights lie beside this file; `python -m benchmarks.shapes_classifier` trains them and records
their accuracy. Distances on these features are no FID: they compare only with each other, and only
between weights of the same sha256.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import load, save

from condiff_jax.data.shapes import COLORS, POSITIONS, SHAPES, TEXTURES, TONES
from condiff_jax.evaluation.metrics.features import FeatureNetwork

WEIGHTS = Path(__file__).with_name("shapes_features.safetensors")
SIDE = 32  # pixels that pictures of any size are brought to
LEAST_SIDE = 16
WIDTH = 64  # features
BATCH = 256
# What it tells apart, and into how many. `count` is one or two shapes; the attributes of shapes
# are those of single ones. `log_size` is log(original's short side in pixels), up to what shows.
HEADS = {
    "colour": len(COLORS),
    "shape": len(SHAPES),
    "position": len(POSITIONS),
    "tone": len(TONES),
    "texture": len(TEXTURES),
    "count": 2,
    "log_size": 1,
}


class ShapesClassifier(nn.Module):
    """Pictures in 0..255 (B, H, W, 3), sides from 16 -> features (B, WIDTH), logits by head."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = images.astype(jnp.float32) / 127.5 - 1
        x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "linear", antialias=True)
        # Pooling forgets places: the coordinates keep them.
        x = _with_coordinates(x)
        x = nn.relu(nn.Conv(16, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(32, (3, 3), 2, name="conv_1")(x))
        x = nn.relu(nn.Conv(40, (3, 3), 2, name="conv_2")(x))  # (B, 8, 8, 40)
        x = nn.relu(nn.Conv(40, (3, 3), name="conv_3")(x))
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="conv_4")(_with_coordinates(x)))
        features = x.mean((1, 2))
        return features, {name: nn.Dense(n, name=name)(features) for name, n in HEADS.items()}


def _with_coordinates(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, H, W, C + 2): with y and x from -1 to 1."""
    axes = (jnp.linspace(-1, 1, n) for n in x.shape[1:3])
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    return jnp.concatenate([x, jnp.broadcast_to(grid, (len(x), *grid.shape))], -1)


def dump(params: dict) -> bytes:
    """Parameters -> the bytes of WEIGHTS: safetensors in float16."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return save({name: np.asarray(value, np.float16) for name, value in flat.items()})


@functools.cache
def parameters() -> dict:
    """The shipped parameters, f32."""
    flat = {name: value.astype(np.float32) for name, value in load(WEIGHTS.read_bytes()).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def sha256() -> str:
    """Of the shipped weights: what a distance on these features is bound to."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


@jax.jit
def apply(params: dict, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`ShapesClassifier` with these parameters."""
    return ShapesClassifier().apply({"params": params}, images)


@functools.cache
def network() -> FeatureNetwork:
    """The shipped classifier's features, as every metric of distributions takes them."""
    return FeatureNetwork(
        name="shapes classifier",
        sha256=sha256(),
        width=WIDTH,
        params=parameters(),
        apply=lambda params, images: apply(params, images)[0],
        least_side=LEAST_SIDE,
        batch=BATCH,
    )


def features(images: np.ndarray) -> np.ndarray:
    """Features f32 (N, WIDTH) of pictures uint8 (N, H, W, 3); ValueError for other input."""
    return network()(images)
