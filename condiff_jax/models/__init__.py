"""Denoisers: one contract, model.apply({"params": p}, x_t, t, cond) -> eps; one file each.

x_t (B, H, W, C) float, t (B,) int32 timestep index, cond a `Cond`. Parametrisation, guidance and
solver never enter a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from condiff_jax.conditioning.control import Weighting
from condiff_jax.models import (
    attention,
    classifier,
    dit,
    mdt,
    mmdit,
    pixart,
    transformer,
    unet,
    unet2d,
)

if TYPE_CHECKING:
    from condiff_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An entry of MODELS.

    settings(config, classes, factor): the module's fields that come from the config and that not
    all have; factor: of the autoencoder. sizes: names for `model.size`, patched: with a patch.
    text: can be conditioned on text.
    """

    module: type[nn.Module]
    settings: Callable
    sizes: dict = dataclasses.field(default_factory=lambda: transformer.SIZES)
    patched: bool = True
    text: bool = True

    def multiple(self, size: str) -> int:
        """What sides of the latents must be a multiple of: the patch, or the deepest level's."""
        name, _, patch = size.partition("/")
        return int(patch) if self.patched else 2 ** (len(self.sizes[name].channels) - 1)


def _transformer(**own: Callable) -> Callable:
    """Settings of a transformer; own: fields of its own, each made from (config, classes)."""

    def settings(config: Config, classes: int | None, factor: int) -> dict:
        model = config.model
        name, patch = model.size.split("/")
        depth, width, heads = transformer.SIZES[name]
        base = model.base_resolution or config.data.resolution
        return {
            "depth": depth,
            "width": width,
            "heads": heads,
            "patch": int(patch),
            "base_grid": base // (int(patch) * factor),
            "position": model.position,
            "unroll": model.unroll,
            **{field: make(config, classes) for field, make in own.items()},
        }

    return settings


def _streams(config: Config, classes: int | None) -> str:
    auto = "qkv" if classes is None else "shared"
    return auto if config.model.streams == "auto" else config.model.streams


def _mmdit(pooled: bool) -> Callable:
    return _transformer(streams=_streams, pooled=lambda *_: pooled)


def _mask_ratio(config: Config, _) -> float:
    return config.model.mask_ratio


def _unet(config: Config, *_) -> dict:
    return {"size": unet.SIZES[config.model.size]}


def _unet2d(config: Config, *_) -> dict:
    model = config.model
    return {"size": unet2d.SIZES[model.size], "conditioner": model.conditioner}


MODELS = {
    "unet": Architecture(unet.UNet, _unet, unet.SIZES, patched=False),
    "unet2d": Architecture(unet2d.UNet2D, _unet2d, unet2d.SIZES, patched=False, text=False),
    "dit_ln": Architecture(dit.DiT, _transformer(), text=False),
    "dit_att": Architecture(dit.DiT, _transformer(cross=lambda *_: True)),
    "mdtv2": Architecture(mdt.MDT, _transformer(mask_ratio=_mask_ratio), text=False),
    "pixart": Architecture(pixart.PixArt, _transformer()),
    "mmdit": Architecture(mmdit.MMDiT, _mmdit(pooled=True)),
    "ours": Architecture(mmdit.MMDiT, _mmdit(pooled=False)),
}


def create(
    config: Config, *, classes: int | None, weighting: Weighting, factor: int = 1
) -> nn.Module:
    """The denoiser `config.model.name`; classes: None for text; factor: of the autoencoder."""
    architecture = MODELS[config.model.name]
    return architecture.module(
        classes=classes,
        weighting=weighting,
        qk_norm=config.model.qk_norm,
        **_computing(config),
        **architecture.settings(config, classes, factor),
    )


def create_classifier(config: Config, *, classes: int) -> classifier.Classifier:
    """The classifier of noised pictures: the encoder half of the UNet of `config.model.size`."""
    return classifier.Classifier(classes=classes, **_computing(config), **_unet(config))


def _computing(config: Config) -> dict:
    """Fields of every module that change how it computes, but not what."""
    model, dtype = config.model, jnp.dtype(config.model.dtype)
    backend = model.attention
    if backend == "auto":
        backend = attention.fastest(jax.default_backend(), dtype)
    return {"remat": model.remat, "backend": backend, "dtype": dtype}
