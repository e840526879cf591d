"""Starting from another run: other data or another resolution (Sec. 2.2).

What a parameter says about pictures is kept; what it says about tokens' positions is resized; what
it says about a data set's classes or words is new when the data set is. Fixed position embeddings,
noise levels (Eq. 3) and guidance (Eq. 4) follow from the config: `model.position`,
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

# Without these in common, parameters of the same shapes would still mean other things.
SAME = (
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
# Condition tokens' own queries, keys and values; without them they share the image tokens'.
CONTEXT = re.compile(r"(model/(?:blocks|last_block)/)context_((?:query|key|value)\w*/.*)")
CONTROL = re.compile(r"model/control/.*")
POSITIONS = re.compile(r"model/(decoder_)?positions")
RELATIVE = re.compile(r"(.*/)?relative_bias")
UNUSED_ROWS = 3  # of MDTv2's bias tables, after the offsets


@dataclasses.dataclass(frozen=True)
class Move:
    """How a parameter comes to be: status kept | resized | new, from the old parameter `source`.

    resize(old array, fresh array) -> array, for status resized.
    """

    status: str
    source: str = ""
    resize: Callable[[jax.Array, jax.Array], jax.Array] | None = None


def shapes_of(objective: DiffusionObjective) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters of an objective by name, "model/final/bias"; nothing is allocated."""
    return by_name(objective.shapes)


def by_name(params) -> dict:
    """A tree of parameters as a flat dictionary."""
    return {path_name(path): a for path, a in jax.tree_util.tree_leaves_with_path(params)}


def plan(old: DiffusionObjective, new: DiffusionObjective) -> dict[str, Move]:
    """The move of each of new's parameters, by name; ConfigError for all that does not match."""
    for field in SAME:
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
    for name, wanted in target.items():
        moves[name] = _move(name, wanted, source, same_semantics, (old, new))
    for name in left(moves, source):
        if not SEMANTIC.fullmatch(name) and not CONTEXT.fullmatch(name):
            raise ConfigError("init", f"the start has {name}, this config does not{_hint(name)}")
    return moves


def _move(name: str, wanted, source: Mapping, same_semantics: bool, systems: tuple) -> Move:
    if SEMANTIC.fullmatch(name) and not same_semantics:
        return Move("new")
    origin = name
    if name not in source:
        if CONTROL.fullmatch(name) and not any(map(CONTROL.fullmatch, source)):
            return Move("new")  # its last layer starts at zero, so the model stays what it was
        if context := CONTEXT.fullmatch(name):
            origin = context[1] + context[2]
        if origin not in source:
            raise ConfigError("init", f"this config has {name}, the start does not{_hint(name)}")
    found = source[origin]
    if found.shape == wanted.shape:
        return Move("kept", origin)
    if POSITIONS.fullmatch(name):
        return Move("resized", origin, _resize_positions(*systems))
    if RELATIVE.fullmatch(name):
        return Move("resized", origin, _resize_relative(*systems))
    raise ConfigError(
        "init",
        f"{name} is {wanted.shape}, but {found.shape} in the start{_hint(name)}",
    )


def _hint(name: str) -> str:
    if CONTROL.fullmatch(name):
        return "; give both the same conditioning.control"
    if CONTEXT.fullmatch(name):
        return "; give both the same model.streams"
    return ""


def left(moves: Mapping[str, Move], source: Mapping) -> list[str]:
    """Old parameters that nothing comes from."""
    used = {move.source for move in moves.values()}
    return [name for name in source if name not in used]


def grid(objective: DiffusionObjective) -> tuple[int, int]:
    """Tokens per column and row of a transformer's pictures."""
    return tuple(side // objective.model.patch for side in objective.latent_shape[:2])


def resizing_matrix(old: int, new: int, mode: str = "resample") -> np.ndarray:
    """(new, old): values at `old` places along an axis -> at `new` places.

    resample: linear interpolation between the same limits, as `layers.position_grid` places them.
    extrapolate: the places of both are 0, 1, 2, ...; those beyond the old ones get zero.
    """
    if mode == "extrapolate":
        return np.eye(new, old)
    places = np.linspace(0, old - 1, new)
    return np.stack([np.interp(places, np.arange(old), row) for row in np.eye(old)], 1)


def _resize_positions(old: DiffusionObjective, new: DiffusionObjective) -> Callable:
    """Learned tables (N, D) start as sin-cos embeddings: what they have learned beyond is resized.

    So an untrained table becomes that of the new grid, as for models whose table is fixed.
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
    """Bias tables (..., entries, heads) over the offsets between tokens, -(n-1) .. n-1 an axis."""
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
    """`resizing_matrix` for offsets; when extrapolating, offset 0 stays in the middle."""
    if mode == "resample":
        return resizing_matrix(2 * old - 1, 2 * new - 1)
    return np.eye(2 * new - 1, 2 * old - 1, old - new)


def move(moves: Mapping[str, Move], old: Mapping, fresh):
    """The new parameters, a tree like `fresh`, from old ones by name; to be jitted."""

    def take(path, array):
        found = moves[path_name(path)]
        if found.status == "new":
            return array
        source = old[found.source]
        return source if found.resize is None else found.resize(source, array)

    return jax.tree_util.tree_map_with_path(take, fresh)


def report(moves: Mapping[str, Move], source: Mapping, target: Mapping) -> str:
    """A line for each parameter: kept, resized, new, or left behind; and how many of each."""
    lines = []
    for name, found in moves.items():
        line = f"{found.status:8} {name} {tuple(target[name].shape)}"
        if found.status == "resized":
            line += f" from {tuple(source[found.source].shape)}"
        elif found.source not in ("", name):
            line += f" from {found.source}"
        lines.append(line)
    behind = left(moves, source)
    lines += [f"{'left':8} {name} {tuple(source[name].shape)}" for name in behind]
    counts = Counter(found.status for found in moves.values())
    numbers = [f"{counts[status]} {status}" for status in ("kept", "resized", "new")]
    return "\n".join([*lines, ", ".join([*numbers, f"{len(behind)} left"])])


def origin(path: str) -> DiffusionObjective:
    """The objective of the run in a work directory; ConfigError if there is none."""
    try:
        return runs.load(path).objective
    except ConfigError as error:
        raise ConfigError("init.path", str(error)) from error


def load(path: str, mesh: Mesh, *, ema: bool, step: int | None = None) -> dict:
    """Parameters by name of a work directory's newest checkpoint; ConfigError if not of `step`."""
    run = runs.load(path, ema=ema, mesh=mesh)
    if step is not None and run.step != step:
        raise ConfigError(
            "init.path",
            f"{path} has trained for {run.step} steps, but init.pretrain.steps={step}",
        )
    return by_name(run.params)
