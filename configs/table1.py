"""Table 1: architectures on ImageNet-1k and CC12M at 256 and 512 pixels.

    --config=configs/table1.py:arch=mmdit,data=cc12m,resolution=256

The 512 pixel models continue from those of 256 pixels.
"""

from configs import base

ROWS = (
    *(
        f"arch={arch},data=imagenet1k,resolution={resolution}"
        for arch in ("unet", "dit_ln", "dit_att", "mdtv2", "pixart", "mmdit", "ours")
        for resolution in (256, 512)
    ),
    *(
        f"arch={arch},data=cc12m,resolution={resolution}"
        for arch in ("unet", "dit_att", "pixart", "mmdit", "ours")
        for resolution in (256, 512)
    ),
)


def get_config(args: str | None = None):
    """Arguments: arch, data (imagenet1k | cc12m), resolution (256 | 512)."""
    row = base.arguments(args, arch="ours", data="imagenet1k", resolution=256)
    return base.paper(row.arch, row.data, row.resolution)
