"""Mode `summary`: the parameter table, the parameter count and the forward FLOP of a config."""

from __future__ import annotations

import json

import jax
from clu import parameter_overview

from condiff_jax.config import Config, ConfigError
from condiff_jax.system import System, Vocabulary, create_vocabulary, open_source
from condiff_jax.system import create as create_system
from condiff_jax.train import forward_flops


def vocabulary(config: Config) -> Vocabulary:
    """That of the data; without data, as many classes as `data.classes` says."""
    if config.data.path or config.data.name == "shapes":
        return create_vocabulary(config, open_source(config))
    return Vocabulary((), tuple(map(str, range(config.data.classes))))


def count_parameters(params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def summarize(system: System) -> dict[str, float]:
    """{"parameters": of the denoiser, "gflop_forward": one image, multiply-add = 2}."""
    params = system.shapes
    return {
        "parameters": count_parameters(params["model"]),
        "gflop_forward": round(forward_flops(system) / 1e9, 3),
    }


def run(config: Config) -> None:
    """Print the table, and as the last line one JSON object; nothing is allocated."""
    system = create_system(config, vocabulary(config))
    params = system.shapes
    print(parameter_overview.get_parameter_overview(params, include_stats=False))
    for name, encoder in system.frozen.items():
        try:
            print(f"Frozen besides: {name}, {count_parameters(encoder.shapes()):,} parameters")
        except ConfigError as error:
            print(f"Frozen besides: {name}, of unknown size ({error})")
    print(json.dumps(summarize(system)))
