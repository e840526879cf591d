"""FID (arXiv:1706.08500): the Frechet distance of two sets of images in a network's features.

Statistics are stored as .npz files with `mu` and `sigma`, as in pytorch-fid and clean-fid, and
with fields that describe the images and the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.metrics.frechet import Moments, frechet_distance
from condiff_jax.runtime.files import write_arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D), f64, of the features of images.

    count: number of images. network, sha256: the feature network's name and that of its weights.
    resolution: height and width of the images. reference: a sha256 of images and network. resize:
    the network's resizing method. Each is None where a file does not contain it.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None
    network: str | None = None
    sha256: str | None = None
    resolution: tuple[int, int] | None = None
    reference: str | None = None
    resize: str | None = None

    @property
    def rank_deficient(self) -> bool | None:
        """Whether the images are too few for a covariance of full rank; None if not known."""
        return None if self.count is None else self.count <= len(self.mean)

    def save(self, path: str) -> None:
        """Write a .npz file atomically; other programs read its `mu` and `sigma`."""
        fields = {name: getattr(self, name) for name in FIELD_SHAPES}
        fields = {name: value for name, value in fields.items() if value is not None}
        arrays = {"mu": self.mean, "sigma": self.covariance, **fields}
        write_arrays(epath.Path(path), arrays)


# Fields of this project's files besides mu and sigma, with the shapes of their arrays.
FIELD_SHAPES = {
    "count": (),
    "network": (),
    "sha256": (),
    "resolution": (2,),
    "reference": (),
    "resize": (),
}


def measure(
    network: FeatureNetwork, batches: Iterable[np.ndarray], keep: list[np.ndarray] | None = None
) -> Statistics:
    """Compute the statistics of batches of images uint8 (B, H, W, 3).

    keep: the features (B, D) of each batch are appended to it, for KID and precision/recall.
    ValueError for fewer than 2 images, for mixed sizes, and as `network` raises it.
    """
    moments, resolution = Moments(), None
    for images in batches:
        size = images.shape[1:3]
        if resolution not in (None, size):
            raise ValueError(f"images of mixed sizes: {resolution} and {size} (height, width)")
        resolution = size
        features = network(images)
        moments.add(features)
        if keep is not None:
            keep.append(features)
    mean, covariance = moments.result()
    return Statistics(
        mean,
        covariance,
        count=moments.count,
        network=network.name,
        sha256=network.sha256,
        resolution=resolution,
        resize=network.resize,
    )


def load(path: str) -> Statistics:
    """Load statistics from a .npz file of this project, pytorch-fid, clean-fid or ADM.

    Reads `mu` and `sigma` among other arrays (ADM has `mu_s`, `sigma_s` and images), or `feats`
    (N, D), which clean-fid stores for KID. ADM resizes images like evaluation.resize=tf, clean-fid
    like `clean`, pytorch-fid by default like neither; their files do not contain the method.
    FileNotFoundError without the file, ValueError for other contents.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            names = ("mu", "sigma", "feats", *FIELD_SHAPES)
            known = {name: arrays[name] for name in names if name in arrays}
            all_names = ", ".join(sorted(arrays)[:10])
    except Exception as error:  # which errors broken files raise is not documented
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    try:
        return _statistics(known)
    except KeyError:
        raise ValueError(f"{path} has neither mu and sigma nor feats, but {all_names}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _statistics(arrays: dict[str, np.ndarray]) -> Statistics:
    """Create statistics from arrays of a file; KeyError if one is missing, ValueError if bad."""
    fields: dict[str, Any] = {}
    if "feats" in arrays and "mu" not in arrays:
        moments = Moments()
        moments.add(arrays["feats"])
        mean, covariance = moments.result()
        fields["count"] = moments.count
    else:
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} do not fit")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mu or sigma contain NaN or infinity")
    fields |= {
        name: arrays[name].tolist()
        for name, shape in FIELD_SHAPES.items()
        if name in arrays and arrays[name].shape == shape
    }
    if "network" in fields:
        fields.setdefault("resize", "")  # a file of this project, older than evaluation.resize
    if "resolution" in fields:
        fields["resolution"] = tuple(fields["resolution"])
    return Statistics(mean, covariance, **fields)


def fid(generated: Statistics, reference: Statistics) -> dict[str, float | bool | None]:
    """Compute fid, and fid_rank_deficient: whether a side has too few images for full rank.

    fid_rank_deficient is None where the number of images is not known. With a rank-deficient
    covariance the distance is too large, and compares only between equal numbers of images.
    ValueError for different networks, resizing methods or resolutions, as far as they are known.
    """
    check_alike(generated, reference)
    value = frechet_distance(
        generated.mean, generated.covariance, reference.mean, reference.covariance
    )
    deficient = {generated.rank_deficient, reference.rank_deficient}
    either: bool | None = True in deficient
    if not either and None in deficient:
        either = None
    return {"fid": value, "fid_rank_deficient": either}


def check_alike(generated: Statistics, reference: Statistics) -> None:
    """Raise ValueError where two statistics are known not to be comparable."""
    a, b = generated, reference
    if len(a.mean) != len(b.mean):
        raise ValueError(
            f"the reference has {len(b.mean)} features, the network {len(a.mean)}: "
            "it is of another network"
        )
    if None not in (a.sha256, b.sha256) and a.sha256 != b.sha256:
        raise ValueError(
            f"the reference is of {b.network} with sha256 {b.sha256[:12]}, not of {a.network} "
            f"with {a.sha256[:12]}"
        )
    if None not in (a.resize, b.resize) and a.resize != b.resize:
        raise ValueError(
            f"the reference is of images with evaluation.resize={b.resize or 'tf'}, not "
            f"{a.resize or 'tf'}"
        )
    if None not in (a.resolution, b.resolution) and a.resolution != b.resolution:
        sizes = [f"{s.resolution[0]} x {s.resolution[1]}" for s in (b, a)]
        raise ValueError(f"the reference is of images of {sizes[0]} pixels, not {sizes[1]}")
