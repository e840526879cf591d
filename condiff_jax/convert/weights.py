"""Weights on disk: safetensors in, parameters out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors.flax import load

from condiff_jax.convert.layout import from_torch
from condiff_jax.convert.published import Rule, from_published


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """The f32 tensors of a .safetensors file, or of the one file or all shards in a folder."""
    place = epath.Path(path)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not files:
        raise FileNotFoundError(f"no .safetensors in {path}")
    if not files[0].exists():
        raise FileNotFoundError(f"{path} does not exist")
    tensors = {}
    for file in files:
        try:
            tensors |= load(file.read_bytes())
        except Exception as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from error
    return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}


def load_published(path: str, rules: Sequence[Rule], shapes: Any) -> dict:
    """Parameters with these shapes from published weights; ValueError where they do not fit."""
    return from_torch(from_published(read_safetensors(path), rules), shapes)
