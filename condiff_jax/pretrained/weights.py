"""Reading and writing of weight files, local or on the hub, without running pickled code."""

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
# Folders of the denoiser in a pipeline, of diffusers or exported by this package.
DENOISER_FOLDERS = ("transformer", "unet", "network")


def locate(source: str, *extra_files: str) -> epath.Path:
    """Resolve a path, or a hub id "owner/name", which is downloaded unless it is cached.

    extra_files: names of files that are downloaded with the weights.
    """
    path = epath.Path(source)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise FileNotFoundError(f"{source} does not exist")
    from huggingface_hub import snapshot_download

    # Pickled files are downloaded only if there are no safetensors.
    for suffixes in (".safetensors",), PICKLED:
        try:
            patterns = [f"*{suffix}" for suffix in suffixes]
            folder = snapshot_download(source, allow_patterns=[*patterns, *extra_files])
        except (OSError, ValueError) as error:  # base classes of the hub's errors
            raise FileNotFoundError(
                f"{source} is neither a path nor on the hub: {error}"
            ) from error
        path = epath.Path(folder)
        if has_weights(path):
            break
    return path


def has_weights(path: epath.Path) -> bool:
    """Whether a path has weight files."""
    try:
        return bool(weight_files(path))
    except FileNotFoundError:
        return False


def weight_files(path: epath.Path) -> list[epath.Path]:
    """List the weight files: the file itself, or all shards in a folder, preferably safetensors.

    The denoiser's subfolder of a pipeline comes before its top folder, where repositories keep the
    same model in other layouts. FileNotFoundError if there are none.
    """
    if not path.is_dir():
        return [path]
    for folder in (*(path / name for name in DENOISER_FOLDERS), path):
        for suffix in (".safetensors", *PICKLED):
            if files := sorted(folder.glob(f"*{suffix}")):
                return files
    raise FileNotFoundError(f"no weights (.safetensors, {', '.join(PICKLED)}) in {path}")


def sha256(files: Iterable[epath.Path]) -> str:
    """Return the SHA-256 of the concatenated contents of files."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(2**24):
                digest.update(chunk)
    return digest.hexdigest()


def read(source: str, ignore: str = "") -> dict[str, np.ndarray]:
    """Read the tensors of a weight file, a folder or a hub id, as f32.

    ignore: regular expression of tensor names to leave out. FileNotFoundError if there are no
    files, ValueError for an unreadable file.
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
    # Training scripts nest the weights under one of these keys.
    for key in ("ema", "model", "state_dict"):
        state = state[key] if isinstance(state.get(key), dict) else state
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def load_published(source: str, rules: Sequence[Rule], shapes: Any, ignore: str = "") -> dict:
    """Load parameters with these shapes from published weights; ValueError if they do not fit."""
    return from_torch(from_published(read(source, ignore), rules), shapes)


def write_json(path: epath.Path, value: Any) -> None:
    """Write an indented JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_tensors(path: epath.Path, tensors: dict[str, np.ndarray]) -> None:
    """Write a .safetensors file, marked as PyTorch's for diffusers and transformers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(a, np.float32) for name, a in tensors.items()}
    path.write_bytes(save(tensors, metadata={"format": "pt"}))
