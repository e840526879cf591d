"""Denoisers: one contract, model.apply({"params": p}, x_t, t, cond) -> eps; one file each.

x_t (B, H, W, C) float, t (B,) int32 timestep index, cond a `Cond`. Parametrisation, guidance and
solver never enter a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flax.linen as nn
import jax.numpy as jnp

from condiff_jax.conditioning.control import Weighting
from condiff_jax.models import mmdit

if TYPE_CHECKING:
    from condiff_jax.config import Config


def _mmdit(config: Config, classes: int | None, weighting: Weighting, factor: int, pooled: bool):
    model = config.model
    depth, width, heads = mmdit.SIZES[model.size.split("/")[0]]
    streams = model.streams
    if streams == "auto":
        streams = "qkv" if classes is None else "shared"
    base = model.base_resolution or config.data.resolution
    return mmdit.MMDiT(
        depth=depth,
        width=width,
        heads=heads,
        patch=model.patch,
        base_grid=base // (model.patch * factor),
        streams=streams,
        pooled=pooled,
        classes=classes,
        weighting=weighting,
        qk_norm=model.qk_norm,
        position=model.position,
        remat=model.remat,
        unroll=model.unroll,
        backend=model.attention,
        dtype=jnp.dtype(model.dtype),
    )


MODELS = {
    "mmdit": lambda *args: _mmdit(*args, pooled=True),
    "ours": lambda *args: _mmdit(*args, pooled=False),
}


def create(
    config: Config, *, classes: int | None, weighting: Weighting, factor: int = 1
) -> nn.Module:
    """The denoiser `config.model.name`; classes: None for text; factor: of the autoencoder."""
    return MODELS[config.model.name](config, classes, weighting, factor)
