"""What the fields of a configuration must agree on. `create_config` is how all modes read one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from condiff_jax.conditioning.control import SCALARS, WEIGHTINGS, groups
from condiff_jax.conditioning.text import PADDINGS
from condiff_jax.config.build import build, get
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import stage_prefixes
from condiff_jax.config.schema import Config
from condiff_jax.data.shapes import LABELS
from condiff_jax.models import MODELS, conditioners, kl


def create_config(values: Mapping[str, Any]) -> Config:
    """The validated `Config` of a ConfigDict or of the mapping in config.json."""
    config = build(values)
    validate(config)
    return config


def validate(config: Config) -> None:
    """ConfigError where the fields of a config, or of an earlier stage of it, do not agree."""
    for prefix, stage in stage_prefixes(config):
        try:
            _validate_registered(stage)
            _validate_model(stage)
            _validate_data(stage)
            _validate_training(stage)
        except ConfigError as error:
            raise ConfigError(prefix + error.field, error.reason) from None


def _validate_registered(config: Config) -> None:
    """Fields that can have any key of a registry."""
    registries = {
        "model.conditioner": conditioners.names(),
        "conditioning.control": groups(),
        "conditioning.weighting": WEIGHTINGS,
        "conditioning.padding": PADDINGS,
    }
    for field, registry in registries.items():
        value = get(config, field)
        for key in value if isinstance(value, tuple) else (value,):
            if key not in registry:
                choices = ", ".join(registry)
                raise ConfigError(field, f"unknown value {key!r}; choose from {choices}")


def _validate_model(config: Config) -> None:
    model = config.model
    architecture = MODELS[model.name]
    names = ", ".join(architecture.sizes)
    size, slash, patch = model.size.partition("/")
    if size not in architecture.sizes or bool(slash) != architecture.patched:
        form = (
            "be NAME/PATCH, such as XL/2, with a name of" if architecture.patched else "be one of"
        )
        raise ConfigError("model.size", f"must {form} {names}; got {model.size!r}")
    if slash and not re.fullmatch("[1-9][0-9]*", patch):
        raise ConfigError("model.size", f"the patch must be a number, as in XL/2; got {patch!r}")
    if not architecture.patched and (model.unroll != 1 or model.remat == "dots"):
        field = "model.unroll" if model.unroll != 1 else "model.remat"
        raise ConfigError(
            field,
            f"model.name={model.name} has no scan over layers; leave model.unroll at 1 and "
            "model.remat at none or block",
        )
    if model.conditioner != "film" and model.name != "unet2d":
        raise ConfigError("model.conditioner", f"must be film for model.name={model.name}")
    if model.streams != "auto" and model.name not in ("mmdit", "ours"):
        raise ConfigError("model.streams", f"must be auto for model.name={model.name}")
    if config.data.semantics == "text" and not architecture.text:
        raise ConfigError(
            "data.semantics", f"model.name={model.name} is for classes only; set it to class"
        )
    factor = kl.SIZES[config.autoencoder.size].factor if config.autoencoder.name != "pixels" else 1
    multiple = architecture.multiple(model.size)
    for field in ("data.resolution", "model.base_resolution"):
        if get(config, field) % (multiple * factor):
            what = "patch" if architecture.patched else "downsampling"
            raise ConfigError(
                field,
                f"must be a multiple of {multiple * factor} ({what} {multiple} x latent factor "
                f"{factor}), got {get(config, field)}",
            )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise ConfigError("model.attention", "cudnn needs model.dtype=bfloat16")


def _validate_data(config: Config) -> None:
    data = config.data
    if len(data.crop) != 2 or not 0 < data.crop[0] <= data.crop[1] <= 1:
        raise ConfigError("data.crop", f"must be two fractions in (0, 1], got {data.crop}")
    if len(data.sizes) != 2 or not 8 <= data.sizes[0] <= data.sizes[1]:
        raise ConfigError("data.sizes", f"must be two sizes from 8 pixels, got {data.sizes}")
    control = config.conditioning.control
    jittered = {scalar.group for scalar in SCALARS.values() if scalar.jitter}
    if not data.color and jittered & set(control):
        raise ConfigError(
            "data.color",
            f"0, but conditioning.control has {', '.join(jittered & set(control))}; set the "
            "strength of the color jitter",
        )
    if data.name == "shapes" and data.semantics == "class" and data.classes not in LABELS:
        choices = " or ".join(str(number) for number in LABELS if number)
        raise ConfigError("data.classes", f"must be {choices} for shapes, got {data.classes}")
    if config.evaluation.reference == "coco" and not config.evaluation.path:
        raise ConfigError("evaluation.path", "evaluation.reference=coco needs a prepared data set")
    if data.name == "latents" and config.autoencoder.name == "pixels":
        raise ConfigError("autoencoder.name", "data.name=latents needs kl or vq")
    low_high = config.sampling.size_range
    if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
        raise ConfigError("sampling.size_range", f"must be two sizes, got {low_high}")
    sizes = config.evaluation.sizes
    if len(sizes) < 2 or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError("evaluation.sizes", f"must be two different sizes or more, got {sizes}")


def _validate_training(config: Config) -> None:
    if config.objective == "reconstruction" and config.autoencoder.name == "pixels":
        raise ConfigError("autoencoder.name", "objective=reconstruction needs kl or vq")
    if config.objective == "classification":
        for field, value in (("data.semantics", "class"), ("model.name", "unet")):
            if get(config, field) != value:
                raise ConfigError(field, f"must be {value} for objective=classification")
    if config.objective != "diffusion":
        if config.data.name == "latents":
            raise ConfigError("data.name", f"objective={config.objective} needs images, no latents")
        for field, empty in (
            ("evaluation.metrics", ()),
            ("init.pretrain", None),
            ("init.path", ""),
            ("sampling.classifier", ""),
        ):
            if get(config, field) != empty:
                raise ConfigError(field, f"must be empty for objective={config.objective}")
    if config.sampling.classifier and config.data.semantics == "text":
        raise ConfigError(
            "sampling.classifier", "guides to a class; data.semantics=text has none, leave it empty"
        )
    if not config.sampling.classifier and config.sampling.classifier_guidance != 1:
        raise ConfigError(
            "sampling.classifier_guidance",
            "needs sampling.classifier, the work directory of a classifier (configs/classifier.py)",
        )
    if config.batch_size % config.optimizer.accumulate:
        raise ConfigError(
            "batch_size",
            f"must be a multiple of optimizer.accumulate={config.optimizer.accumulate}, "
            f"got {config.batch_size}",
        )
    traced = config.profile
    if traced and not (len(traced) == 2 and 0 < traced[0] <= traced[1]):
        raise ConfigError("profile", f"must be a first and a last step, got {traced}")
    if config.diffusion.beta_start > config.diffusion.beta_end:
        raise ConfigError("diffusion.beta_start", "must not be above diffusion.beta_end")
    if config.sampling.steps > config.diffusion.timesteps:
        raise ConfigError(
            "sampling.steps",
            f"must not be above diffusion.timesteps={config.diffusion.timesteps}, "
            f"got {config.sampling.steps}",
        )
