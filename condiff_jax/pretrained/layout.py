"""Conversion between our parameters and PyTorch's layout, the state dict of `pytorch.models`.

In PyTorch linear layers are (out, in), convolutions are (out, in, height, width), heads are not a
separate dimension, and stacked layers are modules instead of a leading dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

# Flax leaf -> PyTorch leaf; other leaves are bare parameters with the same name.
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}


def to_torch(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert a parameter tree to {name: array}; the inverse of `from_torch`."""
    out = {}
    for path, leaf in flatten_dict(params).items():
        array = np.asarray(leaf)
        stack = _stack(path)
        if stack is None:
            out[_name(path)] = _array(path, array)
        else:
            for i, layer in enumerate(array):
                out[_name((*path[: stack + 1], str(i), *path[stack + 1 :]))] = _array(path, layer)
    return out


def from_torch(tensors: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> dict:
    """Convert {name: array} to a parameter tree with the shapes and dtypes of `shapes`.

    The leaves of `shapes` are arrays or ShapeDtypeStructs. ValueError with the first ten names of
    missing, unexpected or misshapen tensors.
    """
    flat = flatten_dict(shapes)
    expected = {}
    for path, leaf in flat.items():
        stack = _stack(path)
        layers = [None] if stack is None else range(leaf.shape[0])
        shape = leaf.shape if stack is None else leaf.shape[1:]
        expected[path] = [
            (path if i is None else (*path[: stack + 1], str(i), *path[stack + 1 :]), shape)
            for i in layers
        ]
    expected_shapes = {
        _name(path): _array(path, np.broadcast_to(np.float32(0), shape)).shape
        for layers in expected.values()
        for path, shape in layers
    }
    check(tensors, expected_shapes)
    out = {}
    for path, leaf in flat.items():
        arrays = [_inverse(p, np.asarray(tensors[_name(p)]), s) for p, s in expected[path]]
        stacked = arrays[0] if _stack(path) is None else np.stack(arrays)
        out[path] = np.asarray(stacked, leaf.dtype)
    return unflatten_dict(out)


def check(tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError unless the tensors have exactly the expected names and shapes."""
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(shape)
    ]
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError("weights do not fit: " + "; ".join(problems[:10]) + more)


def _stack(path: tuple[str, ...]) -> int | None:
    """Index of the stacked module ("...blocks") in a path, or None."""
    return next((i for i, part in enumerate(path) if part.endswith("blocks")), None)


def _name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    return ".".join([*(m for m in modules if m != "linear"), LEAVES.get(leaf, leaf)])


def _merges_heads(path: tuple[str, ...]) -> bool:
    return path[-2] == "linear" and path[-3].endswith("out")


def _array(path: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """Convert the array of one layer to PyTorch's layout."""
    if path[-1] == "bias":
        return array.reshape(-1)
    if path[-1] != "kernel":
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    rows = -1 if _merges_heads(path) else array.shape[0]
    columns = array.shape[-1] if _merges_heads(path) else -1
    return array.reshape(rows, columns).T


def _inverse(path: tuple[str, ...], array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Invert `_array`."""
    if path[-1] == "kernel":
        array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return array.reshape(shape)
