"""The paper's evaluations by name (Sec. 3.1): `evaluation.protocol` in mode evaluate."""

from __future__ import annotations

from typing import Any

from condiff_jax.config.build import get, with_fields
from condiff_jax.config.schema import Config

# ImageNet's guidance: App. C, 1.5 at 256 pixels and 2.0 at 512, which is Eq. 4.
_FID = {
    "sampling.sampler": "ddim",
    "sampling.guidance": 1.5,
    "sampling.base_resolution": 256,
    "sampling.size": "train",
    "evaluation.metrics": ("fid",),
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    # 50,000 pictures against the training set (Tables 1, 2a, 2b)
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
    """The config with the fields of its evaluation.protocol, itself without one.

    How many pictures, and where networks and data are, stays as it is.
    """
    if not config.evaluation.protocol:
        return config
    return with_fields(config, PROTOCOLS[config.evaluation.protocol])


def summary(config: Config) -> str:
    """What `apply` sets, in a line: it goes before the config, and before the command line too."""
    changes = []
    for field, value in PROTOCOLS[config.evaluation.protocol].items():
        before = get(config, field)
        changes.append(f"{field}={value}" + (f" (not {before})" if before != value else ""))
    sets = f"evaluation.protocol={config.evaluation.protocol} sets {', '.join(changes)}"
    return f"{sets}; evaluation.samples stays {config.evaluation.samples}"
