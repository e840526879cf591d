"""ConfigDict or config.json -> `Config`: type, choices and bounds of each single field.

`objectives/validate.py` checks fields against each other; its `create_config` does both.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Conditioning, Config

# Fields of older work directories: section and old name -> new name.
RENAMED = {(Conditioning, "dropping"): "drop_mode"}


def build(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested mappings; a missing field takes its default.

    ConfigError for an unknown field, or a value of another type, out of bounds or not among the
    choices.
    """
    return _section(Config, values, "")


def get(config: Config, field: str) -> Any:
    """The value of a dotted field name."""
    return functools.reduce(getattr, field.split("."), config)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the config with new values by dotted field name; ConfigError as from `build`."""
    sections = dataclasses.asdict(config)
    for field, value in values.items():
        *parents, name = field.split(".")
        section: Any = sections
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        if not isinstance(section, dict):
            raise ConfigError(field, f"this config has no {'.'.join(parents)}")
        section[name] = value
    return build(sections)


def from_text(field: str, text: str) -> Any:
    """Parse the value of a field from the command line; ConfigError as from `build`."""
    hint: Any = Config
    for part in field.split("."):
        hint = Config if hint == Config | None else hint
        hint = _hints(hint).get(part) if dataclasses.is_dataclass(hint) else None
    if hint is None or hint == Config | None or dataclasses.is_dataclass(hint):
        raise ConfigError(field, "no such field; condiff_jax/config/schema.py lists all")
    kind = _kind(hint)
    if kind is str:
        return _value(hint, text, field)
    try:
        value = ast.literal_eval(text.capitalize() if kind is bool else text)
    except (ValueError, SyntaxError, TypeError):
        value = text
    return _value(hint, value, field)


@functools.cache
def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


def _kind(hint: Any) -> type:
    """The type of a field's values: bool, int, float, str or tuple."""
    if get_origin(hint) is Annotated:
        return _kind(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return str
    return get_origin(hint) or hint


def _section(section: type, values: Mapping[str, Any], prefix: str):
    if not hasattr(values, "keys"):
        raise ConfigError(prefix.removesuffix("."), f"must have fields, got {values!r}")
    hints = _hints(section)
    fields = {}
    for key in values:
        name = RENAMED.get((section, key), key)
        if name not in hints:
            raise ConfigError(prefix + key, f"unknown field; choose from {', '.join(hints)}")
        fields[name] = _value(hints[name], values[key], prefix + key)
    return section(**fields)


def _value(hint: Any, value: Any, field: str) -> Any:
    if isinstance(hint, types.UnionType):  # Config | None
        if value is None or isinstance(value, Config):
            return value
        return _section(Config, value, field + ".")
    if dataclasses.is_dataclass(hint):
        return _section(hint, value, field + ".")
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            value = (value,)
        return tuple(_value(get_args(hint)[0], item, field) for item in value)
    kind = _kind(hint)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(field, f"must be of type {kind.__name__}, got {value!r}")
    if get_origin(hint) is Literal and value not in get_args(hint):
        choices = ", ".join(filter(None, get_args(hint)))
        raise ConfigError(field, f"unknown value {value!r}; choose from {choices}")
    if get_origin(hint) is Annotated and value not in (bounds := get_args(hint)[1]):
        raise ConfigError(field, f"must be {bounds}, got {value}")
    return value
