"""ImageNet-1k at 512 pixels (classes), with the paper's recipe for any architecture.

--config=configs/imagenet1k_512.py:arch=mmdit,init=none

Pre-trained at 256 pixels unless init says otherwise.
"""

from configs import base, recipes


def get_config(args: str | None = None):
    """Arguments: arch, init (none | low_res | imagenet22k), scale."""
    row = base.arguments(args, arch="ours", init="low_res", scale="paper")
    return recipes.scaled(recipes.paper(row.arch, "imagenet1k", 512, row.init), row.scale)
