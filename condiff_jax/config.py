"""Configuration: ConfigDict -> the frozen dataclasses of `schema`. All validation lives here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, get_type_hints

from condiff_jax.conditioning.control import GROUPS, KINDS
from condiff_jax.conditioning.dropout import DROPPINGS
from condiff_jax.conditioning.text import PADDINGS
from condiff_jax.data.builders import BUILDERS
from condiff_jax.data.pipeline import SOURCES
from condiff_jax.data.shapes import LABELS
from condiff_jax.diffusion.prediction import PREDICTIONS
from condiff_jax.diffusion.sampler import SAMPLERS, SPACINGS
from condiff_jax.diffusion.schedule import SCHEDULES
from condiff_jax.metrics import METRICS
from condiff_jax.models import MODELS, attention, conditioners, kl
from condiff_jax.models.mmdit import STREAMS
from condiff_jax.models.transformer import REMAT
from condiff_jax.schema import Config, ConfigError, Reconstruction


def create(values: Mapping[str, Any]) -> Config:
    """The validated `Config` of a ConfigDict (or of the mapping in config.json)."""
    config = _build(Config, values, "")
    for number, stage in enumerate(stages(config)[::-1]):
        try:
            _validate(stage)
        except ConfigError as error:
            where = "init.pretrain." * number
            raise ConfigError(str(error).replace("config: ", f"config: {where}", 1)) from None
    return config


def stages(config: Config) -> list[Config]:
    """The stages of an experiment in the order in which they run; the last one is `config`."""
    earlier = config.init.pretrain
    return [*(stages(earlier) if earlier else ()), config]


def _build(cls: type, values: Mapping[str, Any], prefix: str):
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            where = ", ".join(hints)
            raise ConfigError(f"config: unknown field {prefix}{key}; choose from {where}")
    out = {}
    for key, hint in hints.items():
        if key not in values:
            raise ConfigError(f"config: missing field {prefix}{key}")
        value, field = values[key], prefix + key
        if hint == Config | None:
            out[key] = None if value is None else _build(Config, value, field + ".")
        elif dataclasses.is_dataclass(hint):
            out[key] = _build(hint, value, field + ".")
        elif getattr(hint, "__origin__", None) is tuple:
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                value = (value,)
            out[key] = tuple(_scalar(hint.__args__[0], v, field) for v in value)
        else:
            out[key] = _scalar(hint, value, field)
    return cls(**out)


def _scalar(kind: type, value: Any, field: str):
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"config: {field} must be of type {kind.__name__}, got {value!r}")
    return value


# What a field, or each of a tuple's values, can be; a function tells it when asked.
CHOICES = {
    "objective": ("diffusion", "reconstruction", "classification"),
    "model.name": MODELS,
    "model.conditioner": conditioners.names,
    "model.streams": ("auto", *STREAMS),
    "model.position": ("resample", "extrapolate"),
    "model.dtype": ("float32", "bfloat16"),
    "model.attention": attention.BACKENDS,
    "model.remat": REMAT,
    "data.name": SOURCES,
    "data.semantics": ("text", "class"),
    "prepare.builder": ("", *BUILDERS),
    "conditioning.control": GROUPS,
    "conditioning.weighting": KINDS,
    "conditioning.padding": PADDINGS,
    "conditioning.dropping": DROPPINGS,
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "optimizer.name": ("adam", "adamw"),
    "optimizer.schedule": ("constant", "cosine", "rsqrt"),
    "autoencoder.name": ("pixels", "kl", "vq"),
    "autoencoder.size": kl.SIZES,
    "text_encoder.name": ("words", "clip"),
    "sampling.sampler": SAMPLERS,
    "sampling.spacing": SPACINGS,
    "sampling.size": ("fixed", "tied", "untied", "train"),
    "evaluation.metrics": METRICS,
    "evaluation.reference": ("train", "train_200k", "validation", "coco"),
    "evaluation.resize": ("tf", "clean"),
    "evaluation.save": ("", "png", "npz"),
    "evaluation.protocol": ("", "imagenet_fid50k", "val_fid", "coco_clip", "lpips_size"),
}
# Bounds, both inclusive; None is open.
BOUNDS = {
    "seed": (0, 2**32 - 1),
    "steps": (1, None),
    "batch_size": (1, None),
    "model.mask_ratio": (0, 0.8),
    "model.unroll": (1, None),
    "model.base_resolution": (0, None),
    "data.resolution": (1, None),
    "data.classes": (0, None),
    "data.workers": (0, None),
    "data.entangled": (0, 1),
    "prepare.shard_mb": (1, None),
    "prepare.processes": (0, None),
    "encode.views": (1, None),
    "encode.records": (0, None),
    "encode.batch_size": (1, None),
    "encode.shard_mb": (1, None),
    "conditioning.alpha": (0, None),
    "conditioning.k": (0, None),
    "conditioning.beta_txt": (0, None),
    "conditioning.drop_semantics": (0, 1),
    "conditioning.drop_control": (0, 1),
    "diffusion.timesteps": (1, None),
    "diffusion.beta_start": (0, 1),
    "diffusion.beta_end": (0, 1),
    "diffusion.base_resolution": (0, None),
    "optimizer.learning_rate": (0, None),
    "optimizer.decay_after": (1, None),
    "optimizer.warmup": (0, None),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.weight_decay": (0, None),
    "optimizer.clip_norm": (0, None),
    "optimizer.accumulate": (1, None),
    "optimizer.ema": (0, 1),
    **{f"reconstruction.{name}": (0, None) for name in get_type_hints(Reconstruction)},
    "text_encoder.length": (1, None),
    "text_encoder.width": (1, None),
    "sampling.steps": (1, None),
    "sampling.base_resolution": (0, None),
    "sampling.seed": (0, 2**32 - 1),
    "sampling.eta": (0, 1),
    "sampling.batch_size": (1, None),
    "sampling.n": (1, None),
    "evaluation.prompts": (1, None),
    "evaluation.samples": (2, None),
    "evaluation.size_prompts": (1, None),
    "evaluation.every": (0, None),
    "evaluation.every_samples": (2, None),
    "checkpoint.every": (1, None),
    "checkpoint.keep": (1, None),
    "checkpoint.keep_best": (0, None),
    "log.every": (1, None),
    "log.samples_every": (0, None),
    "log.samples": (1, None),
    "log.stall": (0, None),
    "parallel.fsdp": (0, None),
}


def get(config: Config, field: str) -> Any:
    """The value of a dotted field name."""
    for part in field.split("."):
        config = getattr(config, part)
    return config


def _validate(config: Config) -> None:
    for field, choices in CHOICES.items():
        found, choices = get(config, field), choices() if callable(choices) else choices
        for value in found if isinstance(found, tuple) else (found,):
            if value not in choices:
                raise ConfigError(
                    f"config: {field}={value!r} is unknown; choose from "
                    + ", ".join(filter(None, choices))
                )
    for field, (low, high) in BOUNDS.items():
        value = get(config, field)
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            limit = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"config: {field} must be {limit}, got {value}")
    _validate_model(config)
    _validate_data(config)
    _validate_training(config)


def _validate_model(config: Config) -> None:
    model = config.model
    architecture = MODELS[model.name]
    form = rf"({'|'.join(architecture.sizes)}){'/[1-9][0-9]*' if architecture.patched else ''}"
    if not re.fullmatch(form, model.size):
        names = ", ".join(architecture.sizes)
        raise ConfigError(
            f"config: model.size={model.size!r} must be NAME/PATCH with a name of {names}, such as "
            "XL/2"
            if architecture.patched
            else f"config: model.size={model.size!r} is unknown; choose from {names}"
        )
    if not architecture.patched and (model.unroll != 1 or model.remat == "dots"):
        raise ConfigError(
            f"config: model.name={model.name} has no scan over layers; leave model.unroll at 1 and "
            "model.remat at none or block"
        )
    if model.conditioner != OLD["model.conditioner"] and model.name != "unet2d":
        raise ConfigError(f"config: model.conditioner must be film for model.name={model.name}")
    if model.streams != "auto" and model.name not in ("mmdit", "ours"):
        raise ConfigError(f"config: model.streams must be auto for model.name={model.name}")
    if config.data.semantics == "text" and not architecture.text:
        raise ConfigError(
            f"config: model.name={model.name} knows classes only; set data.semantics=class"
        )
    factor = kl.SIZES[config.autoencoder.size].factor if config.autoencoder.name != "pixels" else 1
    multiple = architecture.multiple(model.size)
    for field in ("data.resolution", "model.base_resolution"):
        if get(config, field) % (multiple * factor):
            what = "patch" if architecture.patched else "downsampling"
            raise ConfigError(
                f"config: {field}={get(config, field)} must be a multiple of "
                f"{multiple * factor} ({what} {multiple} x latent factor {factor})"
            )
    if model.attention == "cudnn" and model.dtype != "bfloat16":
        raise ConfigError("config: model.attention=cudnn needs model.dtype=bfloat16")


def _validate_data(config: Config) -> None:
    data = config.data
    if len(data.crop) != 2 or not 0 < data.crop[0] <= data.crop[1] <= 1:
        raise ConfigError(f"config: data.crop must be two fractions in (0, 1], got {data.crop}")
    if len(data.sizes) != 2 or not 8 <= data.sizes[0] <= data.sizes[1]:
        raise ConfigError(f"config: data.sizes must be two sizes from 8 pixels, got {data.sizes}")
    if data.name == "shapes" and data.semantics == "class" and data.classes not in LABELS:
        raise ConfigError(
            f"config: data.classes={data.classes}, but shapes has "
            + " or ".join(str(number) for number in LABELS if number)
        )
    if config.evaluation.reference == "coco" and not config.evaluation.path:
        raise ConfigError("config: evaluation.reference=coco needs evaluation.path, a prepared one")
    if data.name == "latents" and config.autoencoder.name == "pixels":
        raise ConfigError("config: data.name=latents needs autoencoder.name=kl or vq")
    low_high = config.sampling.size_range
    if len(low_high) != 2 or not 1 <= low_high[0] <= low_high[1]:
        raise ConfigError(f"config: sampling.size_range must be two sizes, got {low_high}")
    sizes = config.evaluation.sizes
    if len(sizes) < 2 or min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(
            f"config: evaluation.sizes must be two different ones or more, got {sizes}"
        )


def _validate_training(config: Config) -> None:
    if config.objective == "reconstruction" and config.autoencoder.name == "pixels":
        raise ConfigError("config: objective=reconstruction needs autoencoder.name=kl or vq")
    if config.objective == "classification":
        for field, value in (("data.semantics", "class"), ("model.name", "unet")):
            if get(config, field) != value:
                raise ConfigError(f"config: objective=classification needs {field}={value}")
    if config.objective != "diffusion":
        if config.data.name == "latents":
            raise ConfigError(f"config: objective={config.objective} needs pictures, not latents")
        for field, empty in (
            ("evaluation.metrics", ()),
            ("init.pretrain", None),
            ("init.path", ""),
            ("sampling.classifier", ""),
        ):
            if get(config, field) != empty:
                raise ConfigError(f"config: objective={config.objective} has no {field}")
    if config.sampling.classifier and config.data.semantics == "text":
        raise ConfigError(
            "config: sampling.classifier guides to a class; data.semantics=text has none"
        )
    if not config.sampling.classifier and config.sampling.classifier_guidance != 1:
        raise ConfigError(
            "config: sampling.classifier_guidance needs sampling.classifier, the work directory of "
            "a classifier (configs/classifier.py)"
        )
    if config.batch_size % config.optimizer.accumulate:
        raise ConfigError(
            f"config: batch_size={config.batch_size} must be a multiple of "
            f"optimizer.accumulate={config.optimizer.accumulate}"
        )
    traced = config.profile
    if traced and not (len(traced) == 2 and 0 < traced[0] <= traced[1]):
        raise ConfigError(f"config: profile must be a first and a last step, got {traced}")
    if config.diffusion.beta_start > config.diffusion.beta_end:
        raise ConfigError("config: diffusion.beta_start must not be above diffusion.beta_end")
    if config.sampling.steps > config.diffusion.timesteps:
        raise ConfigError(
            f"config: sampling.steps={config.sampling.steps} must not be above "
            f"diffusion.timesteps={config.diffusion.timesteps}"
        )


# Fields that may differ between the runs that share a work directory: they change neither the
# parameters' meaning nor the sequence of training steps.
FREE = re.compile(
    r"steps|init\.path|(init\.pretrain\.)*(profile|"
    r"(sampling|evaluation|checkpoint|log|parallel|convert|prepare|encode)\..*"
    r"|(data|autoencoder|text_encoder)\.path|data\.workers|model\.(attention|remat|unroll)|init\.path)"
)

# Fields that came later and do change training, with the value that is what came before.
OLD = {"model.conditioner": "film"}


def completed(values: Mapping[str, Any], like: Mapping[str, Any], prefix: str = "") -> dict:
    """What config.json holds with those `FREE` and `OLD` fields that came after it.

    The former are those of `like`, another config.
    """
    out = dict(values)
    for key, value in like.items():
        if isinstance(value, Mapping) and isinstance(values.get(key, {}), Mapping):
            out[key] = completed(values.get(key, {}), value, f"{prefix}{key}.")
        elif key not in values and FREE.fullmatch(prefix + key):
            out[key] = value
        elif key not in values and (field := (prefix + key).replace("init.pretrain.", "")) in OLD:
            out[key] = OLD[field]
    return out


def identity(config: Config) -> dict[str, Any]:
    """The fields by dotted name that must agree within one work directory."""
    free = FREE
    if config.optimizer.schedule == "cosine":  # its decay ends at the last step
        free = re.compile(FREE.pattern.removeprefix("steps|"))
    fields = _flatten(dataclasses.asdict(config))
    return {field: value for field, value in fields.items() if not free.fullmatch(field)}


def differences(old: Config, new: Config) -> list[str]:
    """Lines "field: old -> new" for the fields that must agree within one work directory."""
    before, after = identity(old), identity(new)
    return [
        f"{field}: {before.get(field)} -> {after.get(field)}"
        for field in {**before, **after}
        if before.get(field) != after.get(field)
    ]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out
