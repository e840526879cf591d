"""Table 4c: 512 pixel models from scratch, and from 256 pixel models (ImageNet-1k).

--config=configs/table4c.py:arch=mmdit,init=low_res,scale=small
"""

from configs import base, recipes

PAPER = {
    f"arch={arch},init={init}": {"FID_train": None}
    for arch in ("unet", "mmdit")
    for init in ("none", "low_res")
}
ROWS = tuple(PAPER)
NOTES = (
    "The table is an image that our copy of the paper lacks. Sec. 3.4: pre-training is better by "
    "about 25% for both architectures. Table 1 has 4.81 (UNet) and 3.02 (mmDiT) with it.",
    "Iterations are not in the text: from scratch as many as at 256 pixels, see recipes.py.",
)


def get_config(args: str | None = None):
    """Arguments: arch (unet | mmdit, or any), init (none | low_res), scale."""
    row = base.arguments(args, arch="mmdit", init="low_res", scale="paper")
    config = recipes.paper(row.arch, "imagenet1k", 512, row.init)
    return recipes.scaled(config, row.scale)
