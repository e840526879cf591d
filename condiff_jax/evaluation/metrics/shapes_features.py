"""Small classifier of `shapes` images, whose features the metric frechet_shapes compares.

The weights are beside this file; `python -m benchmarks.shapes_classifier` trains them and records
their accuracy. Distances on these features are not FID: they compare only with each other, and only
for weights of the same sha256.
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
SIDE = 32  # pixels to which images of any size are resized
MIN_SIDE = 16
WIDTH = 64  # features
BATCH = 256
# Outputs of each head. `count` is one or two shapes; the attributes are trained on single shapes.
# `log_size` is log(short side of the original in pixels), up to the size that is visible.
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
    """Classifier of images in 0..255 (B, H, W, 3): features (B, WIDTH) and logits of each head."""

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = images.astype(jnp.float32) / 127.5 - 1
        x = jax.image.resize(x, (len(x), SIDE, SIDE, 3), "linear", antialias=True)
        # Coordinate channels preserve positions, which pooling discards.
        x = _with_coordinates(x)
        x = nn.relu(nn.Conv(16, (3, 3), name="conv_0")(x))
        x = nn.relu(nn.Conv(32, (3, 3), 2, name="conv_1")(x))
        x = nn.relu(nn.Conv(40, (3, 3), 2, name="conv_2")(x))  # (B, 8, 8, 40)
        x = nn.relu(nn.Conv(40, (3, 3), name="conv_3")(x))
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="conv_4")(_with_coordinates(x)))
        features = x.mean((1, 2))
        return features, {name: nn.Dense(n, name=name)(features) for name, n in HEADS.items()}


def _with_coordinates(x: jax.Array) -> jax.Array:
    """Append channels of y and x from -1 to 1: (B, H, W, C) -> (B, H, W, C + 2)."""
    axes = (jnp.linspace(-1, 1, n) for n in x.shape[1:3])
    grid = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    return jnp.concatenate([x, jnp.broadcast_to(grid, (len(x), *grid.shape))], -1)


def dump(params: dict) -> bytes:
    """Serialize parameters to the bytes of WEIGHTS: safetensors in float16."""
    flat = traverse_util.flatten_dict(params, sep="/")
    return save({name: np.asarray(value, np.float16) for name, value in flat.items()})


@functools.cache
def parameters() -> dict:
    """Load the shipped parameters as f32."""
    flat = {name: value.astype(np.float32) for name, value in load(WEIGHTS.read_bytes()).items()}
    return traverse_util.unflatten_dict(flat, sep="/")


@functools.cache
def sha256() -> str:
    """Return the sha256 of the shipped weights; distances compare only where it is equal."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


@jax.jit
def apply(params: dict, images: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Apply `ShapesClassifier` with these parameters."""
    return ShapesClassifier().apply({"params": params}, images)


@functools.cache
def network() -> FeatureNetwork:
    """Return the shipped classifier as a feature network."""
    return FeatureNetwork(
        name="shapes classifier",
        sha256=sha256(),
        width=WIDTH,
        params=parameters(),
        apply=lambda params, images: apply(params, images)[0],
        min_side=MIN_SIDE,
        batch=BATCH,
    )


def features(images: np.ndarray) -> np.ndarray:
    """Compute features f32 (N, WIDTH) of images uint8 (N, H, W, 3); ValueError for other input."""
    return network()(images)
