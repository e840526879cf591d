"""One contract for the frozen networks whose features FID, KID and precision/recall compare."""

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

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Pictures uint8 (N, H, W, 3) -> features f32 (N, width).

    name: for people. sha256: of the weights' files; numbers compare only where it is the same.
    resize: how, where it is not its own way; such numbers do not compare with others either.
    prepare: pictures (B, H, W, 3) -> what `apply(params, prepared) -> (B, width)` takes; best of
    one size for all pictures, because `apply` is compiled for each. least_side: of H and W.
    """

    name: str
    sha256: str
    width: int
    params: Any
    apply: Callable[[Any, jax.Array], jax.Array]
    prepare: Callable[[np.ndarray], Any] = lambda images: images
    least_side: int = 1
    batch: int = 64
    mesh: Mesh | None = None  # devices, of all hosts, that share the work; else one a host
    resize: str = ""

    @property
    def identity(self) -> tuple[str, ...]:
        """What its features depend on besides the pictures."""
        return (self.sha256, self.resize) if self.resize else (self.sha256,)

    def on(self, mesh: Mesh) -> FeatureNetwork:
        """The same network on the devices of a mesh; every host then gives it the same pictures."""
        batch = -(-self.batch // mesh.size) * mesh.size
        return dataclasses.replace(self, mesh=mesh, batch=batch)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features f32 (N, width); ValueError for other input, and for NaNs or infinities."""
        check_images(images, self.least_side)
        parts = []
        for low in range(0, len(images), self.batch):
            part = images[low : low + self.batch]
            n = len(part)
            whole = n if not low else self.batch  # of the others' size: one compilation does
            if self.mesh is not None:
                whole = -(-whole // self.mesh.size) * self.mesh.size
            if n < whole:
                part = np.concatenate([part, np.repeat(part[-1:], whole - n, 0)])
            prepared = self.prepare(part)
            if self.mesh is not None:
                prepared = sharding.put_global(self.mesh, np.asarray(prepared))
            found = self._compiled(self._on_device, jnp.asarray(prepared))
            parts.append(np.asarray(found, np.float32)[:n])
        out = np.concatenate(parts)
        if not np.isfinite(out).all():
            raise ValueError(f"{self.name} gives NaN or infinity as features")
        return out

    @cached_property
    def _on_device(self) -> Any:
        if self.mesh is None:
            return jax.device_put(self.params)
        return jax.device_put(self.params, sharding.replicated(self.mesh))

    @cached_property
    def _compiled(self) -> Callable:
        def precise(params, prepared):
            # By default GPUs and TPUs multiply with fewer bits than these numbers are known for.
            with jax.default_matmul_precision("highest"):
                return self.apply(params, prepared)

        if self.mesh is None:
            return jax.jit(precise)
        return jax.jit(precise, out_shardings=sharding.replicated(self.mesh))


def check_images(images: np.ndarray, least_side: int = 1) -> None:
    """ValueError unless these are pictures uint8 (N > 0, H, W, 3) with large enough sides."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise ValueError(f"images must be uint8 (N, H, W, 3), got {images.dtype} {images.shape}")
    if min(images.shape[1:3]) < least_side:
        raise ValueError(f"images must be {least_side} pixels or more a side, got {images.shape}")


def check_features(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; ValueError unless they are finite (N > 0, D) and (M > 0, D)."""
    first, second = np.asarray(first), np.asarray(second)
    shapes = [a.shape for a in (first, second)]
    if any(a.ndim != 2 or not a.size for a in (first, second)) or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"features must be (N, D) and (M, D), got {shapes[0]} and {shapes[1]}")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("features hold NaN or infinity")
    return first, second


def read_folder(folder: str, batch: int = 64) -> Iterator[np.ndarray]:
    """Pictures uint8 (B, H, W, 3) of the files in a folder and those below it, in order of names.

    FileNotFoundError without any; ValueError for a file that is broken, not RGB, or of another
    size than the first: neither colours nor sizes are guessed, because the numbers depend on both.
    """
    files = sorted(f for f in _walk(epath.Path(folder)) if f.suffix.lower() in ENDINGS)
    if not files:
        raise FileNotFoundError(f"no pictures ({', '.join(ENDINGS)}) in {folder}")
    shape = None
    for low in range(0, len(files), batch):
        pictures = []
        for file in files[low : low + batch]:
            picture = _read_rgb(file)
            shape = shape or picture.shape
            if picture.shape != shape:
                sizes = [f"{s[0]} x {s[1]}" for s in (picture.shape, shape)]
                raise ValueError(f"{file} has {sizes[0]} pixels, but {files[0]} {sizes[1]}")
            pictures.append(picture)
        yield np.stack(pictures)


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below; remote paths have no pattern for that."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _read_rgb(file: epath.Path) -> np.ndarray:
    try:
        with file.open("rb") as handle, Image.open(handle) as image:
            mode, picture = image.mode, np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:  # all that Pillow raises for broken files
        raise ValueError(f"{file} cannot be read: {error}") from error
    if mode != "RGB":
        raise ValueError(f"{file} is a picture of mode {mode}, not RGB")
    return picture
