"""The evaluations of one run, such as those of `evaluation.grid`, as lines of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from condiff_jax.config.errors import ConfigError
from condiff_jax.results import Line, checked, load_json
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import read_json_lines


def read(place: str) -> list[dict[str, Any]]:
    """The records of a work directory, or of a .json file that `report --save` made of some.

    Each gets "root", the folder that its pictures are in. ConfigError where there are none.
    """
    path = epath.Path(place)
    if not path.exists():
        raise ConfigError(place, "is not a config file, a work directory or a .json of evaluations")
    inside = path.is_dir()
    found = read_json_lines(checked(Workdir(place).evaluation)) if inside else load_json(path)
    # Autoencoders and classifiers have other lines there.
    records = [one | {"root": place} for one in found if {"metrics", "sampling"} <= one.keys()]
    if not records:
        raise ConfigError(place, "no evaluations here; --mode=evaluate makes them")
    return records


def fields(record: Mapping[str, Any]) -> dict[str, str]:
    """All that a record's numbers depend on, but for the seed: {field: value}, as rows have it."""
    values = {"step": record["step"], **record["sampling"], **record["evaluation"]}
    return {name: _text(value) for name, value in _flat(values).items() if name != "seed"}


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return out


def _text(value: Any) -> str:
    """A value without what separates the arguments of a row."""
    if isinstance(value, list):
        return "+".join(map(_text, value))
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace(",", ";").replace("=", ":")


def lines(records: Sequence[Mapping[str, Any]]) -> tuple[list[Line], dict[str, str]]:
    """A line for each setting, named by what not all have in common, seeds in it; and the rest.

    Of the same measurement the last counts.
    """
    all_fields = [fields(record) for record in records]
    common = dict(set(all_fields[0].items()).intersection(*(one.items() for one in all_fields)))
    common = {name: value for name, value in all_fields[0].items() if name in common}
    groups: dict[str, dict[int, dict]] = {}
    for record, known in zip(records, all_fields, strict=True):
        row = ",".join(f"{name}={known[name]}" for name in known if name not in common)
        seed = record["sampling"]["seed"]
        one = {**record, "seed": seed, "status": "done", "folder": ""}
        groups.setdefault(row, {})[seed] = one
    found = [Line(row, [some[seed] for seed in sorted(some)]) for row, some in groups.items()]
    return found, common
