"""CC12M at 512 pixels (captions), with the paper's recipe for any architecture.

--config=configs/cc12m_512.py:arch=mmdit,init=imagenet1k

Pre-trained at 256 pixels unless init says otherwise.
"""

from configs import base, recipes


def get_config(args: str | None = None):
    """Arguments: arch, init (none | low_res | imagenet1k | imagenet22k), scale."""
    row = base.arguments(args, arch="ours", init="low_res", scale="paper")
    return recipes.scaled(recipes.paper(row.arch, "cc12m", 512, row.init), row.scale)
