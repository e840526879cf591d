"""Validation across fields of a configuration; all modes create theirs by `create_config`."""

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
    """Create the validated `Config` of a ConfigDict or of the mapping in config.json."""
    config = build(values)
    validate(config)
    return config


def validate(config: Config) -> None:
    """Raise ConfigError if fields of a config or of one of its earlier stages conflict."""
    for prefix, stage in stage_prefixes(config):
        try:
            _validate_registered(stage)
            _validate_model(stage)
            _validate_data(stage)
            _validate_training(stage)
        except ConfigError as error:
            raise ConfigError(prefix + error.field, error.reason) from None


def _validate_registered(config: Config) -> None:
    """Check the fields whose values are keys of a registry."""
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
        expected = "be one of"
        if architecture.patched:
            expected = "be NAME/PATCH, such as XL/2, with a name of"
        raise ConfigError("model.size", f"must {expected} {names}; got {model.size!r}")
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
            kind = "patch" if architecture.patched else "downsampling"
            raise ConfigError(
                field,
                f"must be a multiple of {multiple * factor} ({kind} {multiple} x latent factor "
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
    jittered = {scalar.group for scalar in SCALARS.values() if scalar.jitter} & set(control)
    if not data.color and jittered:
        raise ConfigError(
            "data.color",
            f"0, but conditioning.control has {', '.join(jittered)}; set the strength of the color "
            "jitter",
        )
    if data.name == "shapes" and data.semantics == "class" and data.classes not in LABELS:
        choices = " or ".join(str(number) for number in LABELS if number)
        raise ConfigError("data.classes", f"must be {choices} for shapes, got {data.classes}")
    if config.evaluation.reference == "coco" and not config.evaluation.path:
        raise ConfigError("evaluation.path", "evaluation.reference=coco needs a prepared data set")
    if data.name == "latents" and config.autoencoder.name == "pixels":
        raise ConfigError("autoencoder.name", "data.name=latents needs kl or vq")
    size_range = config.sampling.size_range
    if len(size_range) != 2 or not 1 <= size_range[0] <= size_range[1]:
        raise ConfigError("sampling.size_range", f"must be two sizes, got {size_range}")
    sizes = config.evaluation.sizes
    if len(sizes) < 2 or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError("evaluation.sizes", f"must be at least two different sizes, got {sizes}")


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
            "sampling.classifier",
            "guides to a class, but data.semantics=text has none; leave it empty",
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
    steps = config.profile
    if steps and not (len(steps) == 2 and 0 < steps[0] <= steps[1]):
        raise ConfigError("profile", f"must be a first and a last step, got {steps}")
    if config.diffusion.beta_start > config.diffusion.beta_end:
        raise ConfigError("diffusion.beta_start", "must not be above diffusion.beta_end")
    if config.sampling.steps > config.diffusion.timesteps:
        raise ConfigError(
            "sampling.steps",
            f"must not be above diffusion.timesteps={config.diffusion.timesteps}, "
            f"got {config.sampling.steps}",
        )
