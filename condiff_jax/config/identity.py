"""Fields that identify a training and must agree within a work directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from condiff_jax.config.schema import Config

# Fields that may differ between runs of one work directory: they change neither the meaning of the
# parameters nor the sequence of training steps.
FREE_SECTIONS = {
    "sampling",
    "evaluation",
    "checkpoint",
    "log",
    "parallel",
    "convert",
    "prepare",
    "encode",
}
FREE_FIELDS = {
    "profile",
    "init.path",
    "data.path",
    "data.workers",
    "autoencoder.path",
    "text_encoder.path",
    "model.attention",
    "model.remat",
    "model.unroll",
}

# Fields added after folders were named by `digest`.
LATER = ("data.color",)


def stages(config: Config) -> list[Config]:
    """The stages of an experiment in the order in which they run; the last one is `config`."""
    earlier = config.init.pretrain
    return [*(stages(earlier) if earlier else ()), config]


def stage_prefixes(config: Config) -> list[tuple[str, Config]]:
    """Pairs (prefix of field names such as "init.pretrain.", stage), the last stage first."""
    return [("init.pretrain." * i, stage) for i, stage in enumerate(stages(config)[::-1])]


def identity(config: Config) -> dict[str, Any]:
    """The fields, by dotted name, that must agree within one work directory."""
    fields = flatten(dataclasses.asdict(config))
    return {field: value for field, value in fields.items() if not _is_free(field, config)}


def _is_free(field: str, config: Config) -> bool:
    if field == "steps":
        return config.optimizer.schedule != "cosine"  # its decay ends at the last step
    while field.startswith("init.pretrain."):
        field = field.removeprefix("init.pretrain.")
    return field in FREE_FIELDS or field.split(".")[0] in FREE_SECTIONS


def differences(old: Config, new: Config) -> list[str]:
    """Lines "field: old -> new" for the fields that must agree within one work directory."""
    before, after = identity(old), identity(new)
    return [
        f"{field}: {before.get(field)} -> {after.get(field)}"
        for field in {**before, **after}
        if before.get(field) != after.get(field)
    ]


def digest(config: Config) -> str:
    """8 hex digits, equal for configs whose trainings differ in the number of steps only."""
    # Digests name the folders of sweeps, so a renamed field enters by its first name.
    renamed = ("conditioning.drop_mode", "conditioning.dropping")
    fields = {field.replace(*renamed): value for field, value in identity(config).items()}
    # A later field enters only with a value other than its default.
    fields = {field: value for field, value in fields.items() if value or not field.endswith(LATER)}
    # A training may start from a folder outside of the experiment.
    fields["init.path"] = stages(config)[0].init.path
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with dotted names."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
