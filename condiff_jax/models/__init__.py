"""Denoisers, one file each, with one contract: model.apply({"params": p}, x_t, t, cond) -> eps.

x_t (B, H, W, C) float, t (B,) int32 timestep index, cond a `Cond`. Models are independent of the
parametrization, the guidance and the solver.
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
    """A denoiser architecture, an entry of MODELS.

    settings(config, classes, factor): the fields of the module that are not common to all
    architectures; factor: downsampling factor of the autoencoder. sizes: names that `model.size`
    accepts; patched: they end in a patch size ("XL/2"). text: text conditioning is supported.
    """

    module: type[nn.Module]
    settings: Callable
    sizes: dict = dataclasses.field(default_factory=lambda: transformer.SIZES)
    patched: bool = True
    text: bool = True

    def multiple(self, size: str) -> int:
        """Required divisor of the latents' height and width: patch size, or UNet downsampling."""
        name, _, patch = size.partition("/")
        return int(patch) if self.patched else 2 ** (len(self.sizes[name].channels) - 1)


def _transformer(config: Config, classes: int | None, factor: int) -> dict:
    """Settings of all transformers; the functions below add those of one architecture."""
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
    }


def _dit_att(config: Config, classes: int | None, factor: int) -> dict:
    return _transformer(config, classes, factor) | {"cross": True}


def _mdt(config: Config, classes: int | None, factor: int) -> dict:
    return _transformer(config, classes, factor) | {"mask_ratio": config.model.mask_ratio}


def _ours(config: Config, classes: int | None, factor: int) -> dict:
    streams = config.model.streams
    if streams == "auto":
        streams = "qkv" if classes is None else "shared"
    return _transformer(config, classes, factor) | {"streams": streams}


def _mmdit(config: Config, classes: int | None, factor: int) -> dict:
    return _ours(config, classes, factor) | {"pooled": True}


def _unet(config: Config, *_) -> dict:
    return {"size": unet.SIZES[config.model.size]}


def _unet2d(config: Config, *_) -> dict:
    model = config.model
    return {"size": unet2d.SIZES[model.size], "conditioner": model.conditioner}


MODELS = {
    "unet": Architecture(unet.UNet, _unet, unet.SIZES, patched=False),
    "unet2d": Architecture(unet2d.UNet2D, _unet2d, unet2d.SIZES, patched=False, text=False),
    "dit_ln": Architecture(dit.DiT, _transformer, text=False),
    "dit_att": Architecture(dit.DiT, _dit_att),
    "mdtv2": Architecture(mdt.MDT, _mdt, text=False),
    "pixart": Architecture(pixart.PixArt, _transformer),
    "mmdit": Architecture(mmdit.MMDiT, _mmdit),
    "ours": Architecture(mmdit.MMDiT, _ours),
}


def create(
    config: Config, *, classes: int | None, weighting: Weighting, factor: int = 1
) -> nn.Module:
    """Create the denoiser `config.model.name`.

    classes: number of classes, None for text. factor: downsampling factor of the autoencoder.
    """
    architecture = MODELS[config.model.name]
    return architecture.module(
        classes=classes,
        weighting=weighting,
        qk_norm=config.model.qk_norm,
        **_compute_settings(config),
        **architecture.settings(config, classes, factor),
    )


def create_classifier(config: Config, *, classes: int) -> classifier.Classifier:
    """Create the classifier of noised images: the encoder of the UNet of `config.model.size`."""
    return classifier.Classifier(classes=classes, **_compute_settings(config), **_unet(config))


def _compute_settings(config: Config) -> dict:
    """Fields common to all modules: rematerialization, attention backend and dtype."""
    model = config.model
    dtype = jnp.dtype(model.dtype)
    backend = model.attention
    if backend == "auto":
        backend = attention.fastest(jax.default_backend(), dtype)
    return {"remat": model.remat, "backend": backend, "dtype": dtype}
