"""ImageNet-22k at 256 pixels (classes), with the paper's recipe for any architecture.

--config=configs/imagenet22k_256.py:arch=mmdit,init=imagenet1k
"""

from configs import base, recipes


def get_config(args: str | None = None):
    """Arguments: arch, init (none | imagenet1k), scale."""
    row = base.arguments(args, arch="ours", init="none", scale="paper")
    return recipes.scaled(recipes.paper(row.arch, "imagenet22k", 256, row.init), row.scale)
