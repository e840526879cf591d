"""ImageNet-1k at 256 pixels (classes), with the paper's recipe for any architecture.

--config=configs/imagenet1k_256.py:arch=mmdit
"""

from configs import base, recipes


def get_config(args: str | None = None):
    """Arguments: arch, init (none | imagenet22k), scale."""
    row = base.arguments(args, arch="ours", init="none", scale="paper")
    return recipes.scaled(recipes.paper(row.arch, "imagenet1k", 256, row.init), row.scale)
