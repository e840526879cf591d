"""Mode `summary`: the parameter table, the parameter count and the forward FLOPs of a config.

With --workdir, an empty field that mode train would need is an error. The files that fields name
are not read, as they may be on another machine.
"""

from __future__ import annotations

import json

import jax
from clu import parameter_overview

from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import stage_prefixes
from condiff_jax.config.schema import NETWORK_FIELDS, Config
from condiff_jax.data.pipeline import open_source
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.registry import create_objective
from condiff_jax.objectives.vocabulary import Vocabulary, is_absent, load_vocabulary


def count_parameters(params) -> int:
    """Count the scalars in a tree of arrays or shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def summarize(objective: Objective) -> dict[str, float]:
    """Return {"parameters": count, "gflop_forward": GFLOPs for one image, multiply-add = 2}.

    parameters counts the denoiser; for objectives other than diffusion, all trained networks.
    """
    params = objective.shapes
    return {
        "parameters": count_parameters(params.get("model", params)),
        "gflop_forward": round(objective.forward_flops() / 1e9, 3),
    }


def check(config: Config) -> None:
    """Raise ConfigError for an empty field that training needs; no file is read."""
    for prefix, stage in stage_prefixes(config):
        try:
            if not stage.data.path:
                open_source(stage)
            for encoder in create_objective(stage, Vocabulary((), ())).frozen.values():
                if not get(stage, encoder.field):
                    encoder.files()
            for metric in NETWORK_FIELDS.keys() & stage.evaluation.metrics:
                if not get(stage, NETWORK_FIELDS[metric]):
                    raise ConfigError(NETWORK_FIELDS[metric], f"empty, but {metric} needs it")
        except ConfigError as error:
            raise ConfigError(prefix + error.field, error.reason) from error


def run(config: Config, workdir: str | None = None) -> None:
    """Print the parameter table and, as the last line, one JSON object; nothing is allocated."""
    if workdir:
        check(config)
    if config.data.path and is_absent(config.data.path):
        print(f"Without the data: data.path={config.data.path} is not on this machine")
    objective = create_objective(config, load_vocabulary(config))
    params = objective.shapes
    print(parameter_overview.get_parameter_overview(params, include_stats=False))
    for name, encoder in objective.frozen.items():
        try:
            print(f"Frozen besides: {name}, {count_parameters(encoder.shapes()):,} parameters")
        except (ConfigError, ImportError) as error:  # such as a bucket without the gcs extra
            print(f"Frozen besides: {name}, of unknown size ({error})")
    print(json.dumps(summarize(objective)))
