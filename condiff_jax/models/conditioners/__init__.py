"""Ways to tell `unet2d` its class: each module of this package is a method, by its file's name.

A method defines one or both of

    prepare_conditioning(time_emb, class_emb) -> the embedding (B, E) that all ResNet blocks hear
    class ClassConditioner(Conditioner), which comes after each ResNet block

and inherits what it leaves out: blocks hear the time alone, features stay as they are. Both are
called while the model is set up, so that layers made in them belong to it. These are the points
of extension of the CIFAR-10 conditioning benchmark, see configs/cifar10_conditioning.py.
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
    """Features h (B, H, W, C) after a ResNet block -> the same with the class in them: here, none.

    class_emb, time_emb (B, E); t (B,) int32. groups: of the block's GroupNorms. weighting:
    gamma_c of Eq. 1.
    """

    groups: int = 32
    weighting: Weighting = Weighting()
    dtype: Any = jnp.float32

    def __call__(
        self, h: jax.Array, class_emb: jax.Array, time_emb: jax.Array, t: jax.Array
    ) -> jax.Array:
        return h


def time_alone(time_emb: jax.Array, class_emb: jax.Array) -> jax.Array:
    """`prepare_conditioning` of methods without one."""
    return time_emb


def names() -> tuple[str, ...]:
    """All methods, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], type[Conditioner]]:
    """(prepare_conditioning, ClassConditioner) of a method; ImportError for an unknown one."""
    module = importlib.import_module(f"{__name__}.{name}")
    prepare = getattr(module, "prepare_conditioning", time_alone)
    return prepare, getattr(module, "ClassConditioner", Conditioner)
