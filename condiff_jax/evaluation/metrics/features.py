"""Interface of the frozen networks whose features FID, KID and precision/recall compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from PIL import Image

from condiff_jax.runtime import sharding

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Network from images uint8 (N, H, W, 3) to features f32 (N, width).

    name: for messages and records. sha256: of the weight files. resize: the method, if not the
    network's own. Metrics compare only between networks of equal sha256 and resize.
    prepare: maps images (B, H, W, 3) to the input of `apply(params, prepared) -> (B, width)`, best
    of one size, because `apply` is compiled for each. min_side: minimum of H and W.
    """

    name: str
    sha256: str
    width: int
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    prepare: Callable[[np.ndarray], Any] = lambda images: images
    min_side: int = 1
    batch: int = 64
    mesh: Mesh | None = None  # devices (of all hosts) that share a batch; None: one per host
    resize: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What the features depend on besides the images."""
        return (self.sha256, self.resize) if self.resize else (self.sha256,)

    def on(self, mesh: Mesh) -> FeatureNetwork:
        """Return the network on the devices of a mesh; all hosts must pass the same images then."""
        batch = -(-self.batch // mesh.size) * mesh.size
        return dataclasses.replace(self, mesh=mesh, batch=batch)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Compute features f32 (N, width); ValueError for bad images or non-finite features."""
        check_images(images, self.min_side)
        parts = []
        for low in range(0, len(images), self.batch):
            part = images[low : low + self.batch]
            n = len(part)
            size = n if not low else self.batch  # pad the last batch: one compiled size suffices
            if self.mesh is not None:
                size = -(-size // self.mesh.size) * self.mesh.size
            if n < size:
                part = np.concatenate([part, np.repeat(part[-1:], size - n, 0)])
            prepared = self.prepare(part)
            if self.mesh is not None:
                prepared = sharding.put_global(self.mesh, np.asarray(prepared))
            features = self._compiled(self._on_device, jnp.asarray(prepared))
            parts.append(np.asarray(features, np.float32)[:n])
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise ValueError(f"{self.name} returns NaN or infinity as features")
        return features

    @cached_property
    def _on_device(self) -> Any:
        if self.mesh is None:
            return jax.device_put(self.params)
        return jax.device_put(self.params, sharding.replicated(self.mesh))

    @cached_property
    def _compiled(self) -> Callable:
        def precise(params, prepared):
            # By default GPUs and TPUs multiply with fewer bits than published metrics were.
            with jax.default_matmul_precision("highest"):
                return self.apply(params, prepared)

        if self.mesh is None:
            return jax.jit(precise)
        return jax.jit(precise, out_shardings=sharding.replicated(self.mesh))


def check_images(images: np.ndarray, min_side: int = 1) -> None:
    """Raise ValueError unless images are uint8 (N > 0, H, W, 3) with sides of min_side or more."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    if min(images.shape[1:3]) < min_side:
        raise ValueError(f"images must be {min_side} pixels or more a side, got {images.shape}")


def check_features(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both as arrays; ValueError unless they are finite (N > 0, D) and (M > 0, D)."""
    first, second = np.asarray(first), np.asarray(second)
    shapes = [a.shape for a in (first, second)]
    if any(a.ndim != 2 or not a.size for a in (first, second)) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {shapes[0]} and {shapes[1]}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features contain NaN or infinity")
    return first, second


def read_folder(folder: str, batch: int = 64) -> Iterator[np.ndarray]:
    """Yield images uint8 (B, H, W, 3) of the files in a folder and its subfolders, in name order.

    FileNotFoundError without any. ValueError for a file that is broken, not RGB, or of another
    size than the first: nothing is converted or resized, because metrics depend on both.
    """
    files = sorted(file for file in _walk(epath.Path(folder)) if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"no images ({', '.join(SUFFIXES)}) in {folder}")
    shape = None
    for low in range(0, len(files), batch):
        images = []
        for file in files[low : low + batch]:
            image = _read_rgb(file)
            shape = shape or image.shape
            if image.shape != shape:
                sizes = [f"{s[0]} x {s[1]}" for s in (image.shape, shape)]
                raise ValueError(f"{file} has {sizes[0]} pixels, but {files[0]} {sizes[1]}")
            images.append(image)
        yield np.stack(images)


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """Yield all files below a folder; remote paths do not support recursive patterns."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _read_rgb(file: epath.Path) -> np.ndarray:
    try:
        with file.open("rb") as handle, Image.open(handle) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # all that Pillow raises for broken files
        raise ValueError(f"{file} cannot be read: {error}") from error
    if mode != "RGB":
        raise ValueError(f"{file} is an image of mode {mode}, not RGB")
    return pixels
