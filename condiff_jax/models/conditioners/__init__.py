"""Class-conditioning methods of `unet2d`, one per module of this package, named by its file.

A method defines one or both of

    prepare_conditioning(time_emb, class_emb) -> embedding (B, E), the input of all ResNet blocks
    class ClassConditioner(Conditioner), applied after each ResNet block

The defaults are the time embedding alone, and unchanged features. Both run while the model is set
up, so that layers created in them belong to the model. These are the extension points of the
CIFAR-10 conditioning benchmark, see configs/cifar10_conditioning.py.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.control import Weighting


class Conditioner(nn.Module):
    """Base class: conditions features h (B, H, W, C) after a ResNet block; here, the identity.

    class_emb, time_emb (B, E); t (B,) int32. groups: groups of the block's GroupNorms. weighting:
    gamma_c of Eq. 1.
    """

    groups: int = 32
    weighting: Weighting = Weighting()
    dtype: Any = jnp.float32

    def __call__(
        self, h: jax.Array, class_emb: jax.Array, time_emb: jax.Array, t: jax.Array
    ) -> jax.Array:
        return h


def time_embedding_only(time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
    """Default `prepare_conditioning`: the time embedding, without the class."""
    return time_emb


def names() -> tuple[str, ...]:
    """Names of all methods, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], type[Conditioner]]:
    """Load (prepare_conditioning, ClassConditioner) of a method; ImportError if unknown."""
    module = importlib.import_module(f"{__name__}.{name}")
    prepare = getattr(module, "prepare_conditioning", time_embedding_only)
    return prepare, getattr(module, "ClassConditioner", Conditioner)
