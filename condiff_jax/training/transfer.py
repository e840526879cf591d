"""Initialize a run from another one, with other data or another resolution (Sec. 2.2).

Parameters are kept, with these exceptions: learned positions are resized; parameters for classes or
words are new if the vocabulary is; those for control are new if the start has none. Fixed position
embeddings, noise levels (Eq. 3) and guidance (Eq. 4) follow from the config: `model.position`,
`diffusion.base_resolution` and `sampling.base_resolution`.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from condiff_jax import runs
from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.runtime.sharding import path_name

# Fields that must be equal, as otherwise parameters of the same shape differ in meaning.
MUST_MATCH = (
    "model.name",
    "model.size",
    "diffusion.timesteps",
    "diffusion.prediction",
    "autoencoder.name",
    "autoencoder.size",
    "autoencoder.scale",
    "autoencoder.shift",
)
SEMANTIC = re.compile(r"model/(class_embed|caption|pooled)/.*|text_encoder/.*")
# Separate queries, keys and values of condition tokens; without these, image tokens' are shared.
CONTEXT = re.compile(r"(model/(?:blocks|last_block)/)context_((?:query|key|value)\w*/.*)")
CONTROL = re.compile(r"model/control/.*")
POSITIONS = re.compile(r"model/(decoder_)?positions")
RELATIVE = re.compile(r"(.*/)?relative_bias")
UNUSED_ROWS = 3  # of MDTv2's bias tables, after the offsets


@dataclasses.dataclass(frozen=True)
class Move:
    """The origin of a parameter: status kept, resized or new; source: the old parameter's name.

    resize: for status resized, a function (old array, fresh array) -> array.
    """

    status: str
    source: str = ""
    resize: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def shapes_of(objective: DiffusionObjective) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of an objective's parameters by name, such as "model/final/bias"."""
    return by_name(objective.shapes)


def by_name(params) -> dict:
    """Flatten a tree of parameters to a dictionary by name."""
    return {path_name(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}


def plan(old: DiffusionObjective, new: DiffusionObjective) -> dict[str, Move]:
    """Plan the move of each of new's parameters, by name; ConfigError on a mismatch."""
    for field in MUST_MATCH:
        before, after = get(old.config, field), get(new.config, field)
        if before != after:
            raise ConfigError("init", f"{field} is {after}, but that of the start is {before}")
    before, after = old.config.conditioning.control, new.config.conditioning.control
    if before and after and set(before) != set(after):
        raise ConfigError(
            "init",
            f"the start has conditioning.control={before}, this config has {after}; use the "
            "same conditioning.control",
        )
    source, target = shapes_of(old), shapes_of(new)
    same_semantics = (
        old.vocabulary == new.vocabulary
        and old.config.data.semantics == new.config.data.semantics
        and all(
            get(old.config, field) == get(new.config, field)
            for field in ("text_encoder.name", "text_encoder.length", "text_encoder.width")
        )
    )
    moves = {}
    for name, shape in target.items():
        moves[name] = _move(name, shape, source, same_semantics, (old, new))
    for name in unused(moves, source):
        if not SEMANTIC.fullmatch(name) and not CONTEXT.fullmatch(name):
            raise ConfigError("init", f"the start has {name}, this config does not{_hint(name)}")
    return moves


def _move(name: str, target, source: Mapping, same_semantics: bool, objectives: tuple) -> Move:
    if SEMANTIC.fullmatch(name) and not same_semantics:
        return Move("new")
    origin = name
    if name not in source:
        if CONTROL.fullmatch(name) and not any(map(CONTROL.fullmatch, source)):
            return Move("new")  # control has no effect at initialization, as its last layer is zero
        if context := CONTEXT.fullmatch(name):
            origin = context[1] + context[2]
        if origin not in source:
            raise ConfigError("init", f"this config has {name}, the start does not{_hint(name)}")
    shape = source[origin].shape
    if shape == target.shape:
        return Move("kept", origin)
    if POSITIONS.fullmatch(name):
        return Move("resized", origin, _resize_positions(*objectives))
    if RELATIVE.fullmatch(name):
        return Move("resized", origin, _resize_relative(*objectives))
    raise ConfigError("init", f"{name} is {target.shape}, but {shape} in the start{_hint(name)}")


def _hint(name: str) -> str:
    if CONTROL.fullmatch(name):
        return "; give both the same conditioning.control"
    if CONTEXT.fullmatch(name):
        return "; give both the same model.streams"
    return ""


def unused(moves: Mapping[str, Move], source: Mapping) -> list[str]:
    """Names of the old parameters that no move uses."""
    used = {move.source for move in moves.values()}
    return [name for name in source if name not in used]


def grid(objective: DiffusionObjective) -> tuple[int, int]:
    """Number of (rows, columns) of a transformer's image tokens."""
    return tuple(side // objective.model.patch for side in objective.latent_shape[:2])


def resizing_matrix(old: int, new: int, mode: str = "resample") -> np.ndarray:
    """Matrix (new, old) from values at `old` positions along an axis to values at `new` positions.

    resample: both span the same limits, as in `layers.position_grid`; interpolation is linear.
    extrapolate: positions are 0, 1, 2, ...; values beyond the old ones are zero.
    """
    if mode == "extrapolate":
        return np.eye(new, old)
    positions = np.linspace(0, old - 1, new)
    return np.stack([np.interp(positions, np.arange(old), row) for row in np.eye(old)], 1)


def _resize_positions(old: DiffusionObjective, new: DiffusionObjective) -> Callable:
    """Resizer of learned position tables (N, D), which are initialized to sin-cos embeddings.

    The difference to the initialization is resized and added to that of the new grid. An untrained
    table thus becomes the new grid's, as for models with fixed tables.
    """
    before, after = (
        jnp.asarray(objective.model.positions(np.zeros((1, *objective.latent_shape))))
        for objective in (old, new)
    )
    rows, columns = (
        resizing_matrix(*sides, new.config.model.position)
        for sides in zip(grid(old), grid(new), strict=True)
    )

    def resize(table: jax.Array, _) -> jax.Array:
        learned = (table - before).reshape(*grid(old), -1)
        learned = jnp.einsum("rh,cw,hwd->rcd", rows, columns, learned)
        return after + learned.reshape(after.shape)

    return resize


def _resize_relative(old: DiffusionObjective, new: DiffusionObjective) -> Callable:
    """Resizer of bias tables (..., entries, heads) over token offsets, -(n-1) .. n-1 an axis."""
    mode = new.config.model.position
    rows, columns = (
        _offset_matrix(*sides, mode) for sides in zip(grid(old), grid(new), strict=True)
    )

    def resize(table: jax.Array, fresh: jax.Array) -> jax.Array:
        shape = [2 * n - 1 for n in grid(old)]
        offsets = table[..., :-UNUSED_ROWS, :].reshape(*table.shape[:-2], *shape, -1)
        offsets = jnp.einsum("rh,cw,...hwk->...rck", rows, columns, offsets)
        offsets = offsets.reshape(*fresh.shape[:-2], -1, fresh.shape[-1])
        return jnp.concatenate([offsets, table[..., -UNUSED_ROWS:, :]], -2)

    return resize


def _offset_matrix(old: int, new: int, mode: str) -> np.ndarray:
    """`resizing_matrix` for offsets; extrapolation keeps offset 0 in the middle."""
    if mode == "resample":
        return resizing_matrix(2 * old - 1, 2 * new - 1)
    return np.eye(2 * new - 1, 2 * old - 1, old - new)


def move(moves: Mapping[str, Move], old: Mapping, fresh):
    """Create the new parameters, a tree like `fresh`, from old ones by name; to be jitted."""

    def take(path, array):
        origin = moves[path_name(path)]
        if origin.status == "new":
            return array
        source = old[origin.source]
        return source if origin.resize is None else origin.resize(source, array)

    return jax.tree_util.tree_map_with_path(take, fresh)


def report(moves: Mapping[str, Move], source: Mapping, target: Mapping) -> str:
    """Describe each parameter in a line: kept, resized, new, or left (unused); then the counts."""
    lines = []
    for name, origin in moves.items():
        line = f"{origin.status:8} {name} {tuple(target[name].shape)}"
        if origin.status == "resized":
            line += f" from {tuple(source[origin.source].shape)}"
        elif origin.source not in ("", name):
            line += f" from {origin.source}"
        lines.append(line)
    left = unused(moves, source)
    lines += [f"{'left':8} {name} {tuple(source[name].shape)}" for name in left]
    counts = Counter(origin.status for origin in moves.values())
    numbers = [f"{counts[status]} {status}" for status in ("kept", "resized", "new")]
    return "\n".join([*lines, ", ".join([*numbers, f"{len(left)} left"])])


def load_objective(path: str) -> DiffusionObjective:
    """Load the objective of the run in a work directory; ConfigError if there is none."""
    try:
        return runs.load(path).objective
    except ConfigError as error:
        raise ConfigError("init.path", str(error)) from error


def load(path: str, mesh: Mesh, *, ema: bool, step: int | None = None) -> dict:
    """Load a run's newest parameters by name; ConfigError if they are not of `step`."""
    run = runs.load(path, ema=ema, mesh=mesh)
    if step is not None and run.step != step:
        raise ConfigError(
            "init.path",
            f"{path} has trained for {run.step} steps, but init.pretrain.steps={step}",
        )
    return by_name(run.params)
