"""Shardings: one mesh, and regex rules from parameter names to partition specs.

Layers carry no sharding: XLA derives the rest from the shardings of parameters and batch.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
# Every parameter must match exactly one rule. Matrices are split along their input dimension. Those
# whose input is small or consists of heads are split along their output, so that a gather restores
# whole heads. Modules named "...blocks" are stacked by layer: their first dimension is never split.
STACKED = re.compile(r"(.*/)?\w*blocks/")
# Layers of conditioning methods (models/conditioners) may have any names: their first dimension is
# split.
USER_LAYERS = re.compile(r"(.*/)?model/(\w+_class_\d+|class_prepare)/")
RULES = (
    (r"(context_)?(query|key|value)/linear/kernel", P("fsdp")),  # (D, heads, head size)
    (r"(context_)?out/linear/kernel", P(None, None, "fsdp")),  # (heads, head size, D)
    (r"(fc1|fc2|skip)/kernel", P("fsdp")),  # (D, 4D), (4D, D), (2D, D)
    (r"(\w+_)?modulation/linear/kernel", P("fsdp")),  # (D, 6D)
    (r"(\w+_)?modulation/table", P(None, "fsdp")),  # (6, D)
    (r"model/(patch_embed|caption)/kernel", P(None, "fsdp")),  # (C, D)
    (r"model/final/kernel", P("fsdp")),  # (D, p p C)
    (r"(conv_in|conv1|conv2|shortcut|proj_in|proj_out)/kernel", P(None, None, None, "fsdp")),
    (r"\w+_(down|up)sample/kernel", P(None, None, None, "fsdp")),  # (height, width, in, out)
    (r"(model|encoder|decoder)/conv_out/kernel", P(None, None, "fsdp")),
    (r"(quant_conv|post_quant_conv|critic/\w+|lpips/\w+/\w+)/kernel|lpips/heads/\d+", P()),
    (r"(time|norm2/projection|classifier/head)/kernel", P("fsdp")),  # (E, C)
    (r"embedding", P(None, "fsdp")),  # (entries, D)
    (r"model/(decoder_)?positions", P(None, "fsdp")),  # (N, D)
    (r"text_encoder/positions|mask_token|relative_bias", P()),
    (r"bias|scale", P()),
)


def local_mesh() -> Mesh:
    """Create a (data, 1) mesh of the devices of this host."""
    devices = jax.local_devices()
    types = (AxisType.Auto,) * 2
    return jax.make_mesh((len(devices), 1), BATCH_AXES, axis_types=types, devices=devices)


def create_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Create a (data, fsdp) mesh of these devices, by default all; ValueError if fsdp does not fit.

    fsdp: must divide the number of devices; 0 for its greatest common divisor with 8.
    """
    count = jax.device_count() if devices is None else len(devices)
    fsdp = fsdp or math.gcd(8, count)
    if count % fsdp:
        raise ValueError(f"config: parallel.fsdp={fsdp} must divide the number of devices, {count}")
    # jax.make_mesh cannot place an axis of 8 devices in a torus of 16 x 16 or 4 x 4 x 4.
    grid = mesh_utils.create_device_mesh(
        (count // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """Wrap a function to be jitted, so that the layers that it traces can use `mesh`."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shard the first dimension over all devices."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Place a whole copy on every device."""
    return NamedSharding(mesh, P())


def matching_rules(name: str) -> list[P]:
    """Return the specs of the rules that match a parameter name, such as "model/final/bias"."""
    if USER_LAYERS.match(name):
        return [P() if re.search("/(bias|scale)$", name) else P("fsdp")]
    layer = (None,) if STACKED.match(name) else ()
    return [P(*layer, *spec) for rule, spec in RULES if re.fullmatch(rf"(.*/)?({rule})", name)]


def tree_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of every leaf of a state or parameter tree (arrays, ShapeDtypeStructs).

    The names of optimizer moments and EMA end in their parameter's name, so they share its rule.
    Scalars are replicated, and so is a dimension that the mesh axis does not divide. ValueError for
    a name that does not match exactly one rule.
    """

    def leaf_sharding(path, leaf):
        if not leaf.shape:
            return replicated(mesh)
        name = path_name(path)
        specs = matching_rules(name)
        if len(specs) != 1:
            raise ValueError(f"{name} matches {len(specs)} sharding rules, expected exactly one")
        axes = [
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip((*specs[0], *[None] * leaf.ndim), leaf.shape, strict=False)
        ]
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def put(mesh: Mesh, tree: Any) -> Any:
    """Put parameters, the same on every host, on the devices with the shardings of the rules."""
    return jax.device_put(tree, tree_shardings(mesh, tree))


def path_name(path: tuple) -> str:
    """Format a tree path as "a/b/c"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Make global device arrays (B, ...) of host-local numpy arrays (B / hosts, ...)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch
    )


def put_global(mesh: Mesh, batch: Any) -> Any:
    """Shard numpy arrays (B, ...) that are the same on every host over all devices."""
    sharding = batch_sharding(mesh)

    def put_array(array):
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put_array, batch)
