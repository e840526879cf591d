"""Evaluation protocols of the paper by name (Sec. 3.1): `evaluation.protocol` in mode evaluate."""

from __future__ import annotations

from typing import Any

from condiff_jax.config.build import get, with_fields
from condiff_jax.config.schema import Config

# Guidance for ImageNet in App. C: 1.5 at 256 pixels and 2.0 at 512, which follows Eq. 4.
_FID = {
    "sampling.sampler": "ddim",
    "sampling.guidance": 1.5,
    "sampling.base_resolution": 256,
    "sampling.size": "train",
    "evaluation.metrics": ("fid",),
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    # 50,000 images against the training set (Tables 1, 2a, 2b)
    "imagenet_fid50k": _FID | {"sampling.steps": 250, "evaluation.reference": "train"},
    # against the validation set (Figs. 8 and A2)
    "val_fid": _FID | {"sampling.steps": 50, "evaluation.reference": "validation"},
    # captions of COCO's validation set
    "coco_clip": {
        "sampling.sampler": "ddim",
        "sampling.steps": 25,
        "sampling.guidance": 5.0,
        "sampling.base_resolution": 0,
        "sampling.size": "train",
        "evaluation.metrics": ("clip_score",),
        "evaluation.reference": "coco",
    },
    # LPIPS and LPIPS/HR (Table 2a); evaluation.lpips names the weights
    "lpips_size": {"sampling.sampler": "ddim", "evaluation.metrics": ("size_response",)},
}


def apply(config: Config) -> Config:
    """Return the config with the fields of its evaluation.protocol; unchanged without one.

    The number of images and the paths of networks and data stay.
    """
    if not config.evaluation.protocol:
        return config
    return with_fields(config, PROTOCOLS[config.evaluation.protocol])


def summary(config: Config) -> str:
    """Describe in one line the fields that `apply` sets, which override config and command line."""
    changes = []
    for field, value in PROTOCOLS[config.evaluation.protocol].items():
        before = get(config, field)
        changes.append(f"{field}={value}" + (f" (not {before})" if before != value else ""))
    return (
        f"evaluation.protocol={config.evaluation.protocol} sets {', '.join(changes)}; "
        f"evaluation.samples stays {config.evaluation.samples}"
    )
