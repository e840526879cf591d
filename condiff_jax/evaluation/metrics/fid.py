"""FID (arXiv:1706.08500): the Frechet distance of two sets of pictures in a network's features.

Statistics are kept as .npz files with `mu` and `sigma`, as pytorch-fid and clean-fid read and
write them, and what they were made of beside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.metrics.frechet import Moments, frechet_distance


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D), f64, of the features of pictures.

    count: pictures. network, sha256: the feature network's name and that of its weights.
    resolution: height and width of the pictures. reference: a sha256 of what they and the network
    are. resize: of the network. Each is None where a file does not say it.
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
        """Whether the pictures are too few for a covariance of full rank; None if not known."""
        return None if self.count is None else self.count <= len(self.mean)

    def save(self, path: str) -> None:
        """Write a .npz file, whole or not at all; other programs read its `mu` and `sigma`."""
        about = {name: getattr(self, name) for name in ABOUT}
        about = {name: value for name, value in about.items() if value is not None}
        temporary = epath.Path(f"{path}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, **about)
        temporary.replace(path)


# What only our files have, with its shape.
ABOUT = {"count": (), "network": (), "sha256": (), "resolution": (2,), "reference": ()}
ABOUT |= {"resize": ()}


def measure(
    network: FeatureNetwork, batches: Iterable[np.ndarray], keep: list[np.ndarray] | None = None
) -> Statistics:
    """Statistics of pictures uint8 (B, H, W, 3) that come in parts.

    keep: gets the features (B, D) of each part, for KID and precision/recall. ValueError for fewer
    than 2 pictures, for mixed sizes, and as from the network.
    """
    moments, resolution = Moments(), None
    for images in batches:
        size = images.shape[1:3]
        if resolution not in (None, size):
            raise ValueError(f"pictures of mixed sizes: {resolution} and {size} (height, width)")
        resolution = size
        features = network(images)
        moments.add(features)
        if keep is not None:
            keep.append(features)
    about = {"network": network.name, "sha256": network.sha256, "resize": network.resize}
    return Statistics(*moments.result(), moments.count, resolution=resolution, **about)


def load(path: str) -> Statistics:
    """Statistics from a .npz file: ours, pytorch-fid's, clean-fid's or ADM's.

    `mu` and `sigma`, whatever else there is (ADM has `mu_s`, `sigma_s` and pictures), or `feats`
    (N, D), which clean-fid keeps for KID. ADM resizes pictures as evaluation.resize=tf does,
    clean-fid as `clean` and pytorch-fid as neither, unless told to; the files do not say it.
    FileNotFoundError without the file, ValueError for others.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with file.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
            names = ("mu", "sigma", "feats", *ABOUT)
            found = {name: arrays[name] for name in names if name in arrays}
            others = ", ".join(sorted(arrays)[:10])
    except Exception as error:  # what broken files raise is not documented
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    try:
        return _statistics(found)
    except KeyError:
        raise ValueError(f"{path} has neither mu and sigma nor feats, but {others}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _statistics(arrays: dict[str, np.ndarray]) -> Statistics:
    about: dict[str, Any] = {}
    if "feats" in arrays and "mu" not in arrays:
        moments = Moments()
        moments.add(arrays["feats"])
        mean, covariance = moments.result()
        about["count"] = moments.count
    else:
        mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape} do not fit")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mu or sigma hold NaN or infinity")
    about |= {
        name: arrays[name].tolist()
        for name, shape in ABOUT.items()
        if name in arrays and arrays[name].shape == shape
    }
    if "network" in about:
        about.setdefault("resize", "")  # ours, and maybe from before there was a choice
    if "resolution" in about:
        about["resolution"] = tuple(about["resolution"])
    return Statistics(mean, covariance, **about)


def fid(generated: Statistics, reference: Statistics) -> dict[str, float | bool | None]:
    """The distance, and whether either side has too few pictures for a covariance of full rank.

    Keys fid and fid_rank_deficient (None where a file does not say how many pictures it is of):
    such a distance is too large, and compares only with those of as many pictures. ValueError for
    statistics of different networks, ways to resize or resolutions, as far as they are known.
    """
    check_alike(generated, reference)
    value = frechet_distance(
        generated.mean, generated.covariance, reference.mean, reference.covariance
    )
    few = {generated.rank_deficient, reference.rank_deficient}
    return {"fid": value, "fid_rank_deficient": True in few or (None if None in few else False)}


def check_alike(generated: Statistics, reference: Statistics) -> None:
    """ValueError where statistics are known not to compare."""
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
            f"the reference is of pictures with evaluation.resize={b.resize or 'tf'}, not "
            f"{a.resize or 'tf'}"
        )
    if None not in (a.resolution, b.resolution) and a.resolution != b.resolution:
        sizes = [f"{s.resolution[0]} x {s.resolution[1]}" for s in (b, a)]
        raise ValueError(f"the reference is of pictures of {sizes[0]} pixels, not {sizes[1]}")
