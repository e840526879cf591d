"""CC12M at 256 pixels (captions), with the paper's recipe for any architecture.

--config=configs/cc12m_256.py:arch=mmdit,init=imagenet1k
"""

from configs import base, recipes


def get_config(args: str | None = None):
    """Arguments: arch, init (none | imagenet1k | imagenet22k), scale."""
    row = base.arguments(args, arch="ours", init="none", scale="paper")
    return recipes.scaled(recipes.paper(row.arch, "cc12m", 256, row.init), row.scale)
