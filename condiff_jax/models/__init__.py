"""Denoisers: one contract, model.apply({"params": p}, x_t, t, cond) -> eps; one file each.

x_t (B, H, W, C) float, t (B,) int32 timestep index, cond a `Cond`. Parametrisation, guidance and
solver never enter a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from condiff_jax.conditioning.control import Weighting
from condiff_jax.models import dit, mdt, mmdit, pixart, transformer

if TYPE_CHECKING:
    from condiff_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An entry of MODELS. settings(config, classes): the fields that other models do not have."""

    module: type[nn.Module]
    settings: Callable = lambda config, classes: {}
    text: bool = True  # can be conditioned on text


def _streams(config: Config, classes: int | None) -> str:
    auto = "qkv" if classes is None else "shared"
    return auto if config.model.streams == "auto" else config.model.streams


MODELS = {
    "dit_ln": Architecture(dit.DiT, text=False),
    "dit_att": Architecture(dit.DiT, lambda *_: {"cross": True}),
    "mdtv2": Architecture(mdt.MDT, lambda c, _: {"mask_ratio": c.model.mask_ratio}, text=False),
    "pixart": Architecture(pixart.PixArt),
    "mmdit": Architecture(mmdit.MMDiT, lambda *a: {"streams": _streams(*a), "pooled": True}),
    "ours": Architecture(mmdit.MMDiT, lambda *a: {"streams": _streams(*a), "pooled": False}),
}


def create(
    config: Config, *, classes: int | None, weighting: Weighting, factor: int = 1
) -> nn.Module:
    """The denoiser `config.model.name`; classes: None for text; factor: of the autoencoder."""
    model = config.model
    architecture = MODELS[model.name]
    depth, width, heads = transformer.SIZES[model.size.split("/")[0]]
    base = model.base_resolution or config.data.resolution
    return architecture.module(
        depth=depth,
        width=width,
        heads=heads,
        patch=model.patch,
        base_grid=base // (model.patch * factor),
        classes=classes,
        weighting=weighting,
        qk_norm=model.qk_norm,
        position=model.position,
        remat=model.remat,
        unroll=model.unroll,
        backend=model.attention,
        dtype=jnp.dtype(model.dtype),
        **architecture.settings(config, classes),
    )
