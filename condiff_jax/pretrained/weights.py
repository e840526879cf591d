"""Weights on disk or on the hub: safetensors and PyTorch files in, tensors out; no pickled code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath
from safetensors.flax import load
from safetensors.numpy import save

from condiff_jax.pretrained.key_maps import Rule, from_published
from condiff_jax.pretrained.layout import from_torch

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
# Folders of a pipeline, diffusers' or one that we exported, that hold a denoiser.
PARTS = ("transformer", "unet", "network")


def locate(source: str, *others: str) -> epath.Path:
    """A local or remote path, or the local copy of a hub id "owner/name", fetched if need be.

    others: names of files that are fetched with the weights.
    """
    path = epath.Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"{source} does not exist")
    from huggingface_hub import snapshot_download

    for endings in (".safetensors",), PICKLED:  # the second only where the first are missing
        try:
            patterns = [f"*{end}" for end in endings]
            folder = snapshot_download(source, allow_patterns=[*patterns, *others])
        except (OSError, ValueError) as error:  # what the hub's errors derive from
            raise FileNotFoundError(
                f"{source} is neither a path nor on the hub: {error}"
            ) from error
        path = epath.Path(folder)
        if has_weights(path):
            break
    return path


def has_weights(path: epath.Path) -> bool:
    """Whether `weight_files` finds any."""
    try:
        return bool(weight_files(path))
    except FileNotFoundError:
        return False


def weight_files(path: epath.Path) -> list[epath.Path]:
    """The file itself, or those of a folder: safetensors before others, all shards.

    A pipeline's parts come before its top, where hubs keep the same model in other layouts.
    """
    if not path.is_dir():
        return [path]
    for folder in (*(path / part for part in PARTS), path):
        for ending in (".safetensors", *PICKLED):
            if files := sorted(folder.glob(f"*{ending}")):
                return files
    raise FileNotFoundError(f"no weights (.safetensors, {', '.join(PICKLED)}) in {path}")


def sha256(files: Iterable[epath.Path]) -> str:
    """Of the contents of files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()


def read(source: str, ignore: str = "") -> dict[str, np.ndarray]:
    """The tensors of a weight file, of a folder or of a hub id, as f32.

    ignore: pattern of names to leave out.
    FileNotFoundError where there are none, ValueError for a file that is not what its name says.
    """
    tensors = {}
    for file in weight_files(locate(source)):
        try:
            tensors |= _read_pickled(file) if file.suffix in PICKLED else load(file.read_bytes())
        except ImportError:
            raise ValueError(f"{file} needs PyTorch to be read: pip install torch") from None
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    return {
        name: np.asarray(tensor, np.float32)
        for name, tensor in tensors.items()
        if not re.fullmatch(ignore, name)
    }


def _read_pickled(file: epath.Path) -> dict[str, np.ndarray]:
    import torch

    with file.open("rb") as handle:
        state = torch.load(handle, map_location="cpu", weights_only=True)
    for part in ("ema", "model", "state_dict"):  # what training scripts wrap weights in
        state = state[part] if isinstance(state.get(part), dict) else state
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def load_published(source: str, rules: Sequence[Rule], shapes: Any, ignore: str = "") -> dict:
    """Parameters with these shapes from published weights; ValueError where they do not fit."""
    return from_torch(from_published(read(source, ignore), rules), shapes)


def write_json(path: epath.Path, value: Any) -> None:
    """A JSON file, readable by people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
    """A .safetensors file, which diffusers and transformers recognise as PyTorch's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(a, np.float32) for name, a in tensors.items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
