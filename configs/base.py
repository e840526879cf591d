"""Defaults of all configs, and helpers that parse their arguments.

`condiff_jax/config/schema.py` declares every field. Override any of them on the command line:
`--config.optimizer.learning_rate=3e-4`.
"""

import dataclasses

from ml_collections import ConfigDict

from condiff_jax.config.schema import Config


def arguments(text: str | None, **defaults) -> ConfigDict:
    """Parse `key=value,other=value` of `--config=configs/X.py:...`, typed by `defaults`."""
    values = ConfigDict(defaults)
    for item in filter(None, (text or "").split(",")):
        key, _, value = item.partition("=")
        if key not in defaults:
            known = ", ".join(defaults) or "none"
            raise ValueError(f"unknown config argument {key!r}; this config takes: {known}")
        kind = type(defaults[key])
        try:
            values[key] = value in ("1", "true", "True") if kind is bool else kind(value)
        except ValueError:
            raise ValueError(
                f"config argument {key}={value!r} is not of type {kind.__name__}"
            ) from None
    return values


def choose(name: str, value, choices) -> None:
    """Check a config argument; the ValueError names it and its choices."""
    if value not in choices:
        known = ", ".join(map(str, choices))
        raise ValueError(f"config argument {name}={value} is unknown; choose from {known}")


def get_config() -> ConfigDict:
    """Return the defaults: the paper's model and recipe on the embedded data."""
    return ConfigDict(dataclasses.asdict(Config()))
