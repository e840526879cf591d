"""Table 4a: ImageNet-1k before ImageNet-22k or CC12M, at 256 pixels; iterations in thousands.

--config=configs/table4a.py:init=imagenet1k,data=cc12m,steps=100,scale=small
"""

from configs import base, recipes

PAPER = {
    "init=none,data=imagenet22k,steps=375": {"FID_train": 5.80},
    "init=imagenet1k,data=imagenet22k,steps=80": {"FID_train": 5.29},
    "init=imagenet1k,data=imagenet22k,steps=110": {"FID_train": 4.67},
    "init=none,data=cc12m,steps=600": {"FID_val": 7.54, "CLIP_COCO": 24.78},
    "init=imagenet1k,data=cc12m,steps=60": {"FID_val": 7.59, "CLIP_COCO": 25.09},
    "init=imagenet1k,data=cc12m,steps=100": {"FID_val": 7.27, "CLIP_COCO": 25.62},
    "init=imagenet1k,data=cc12m,steps=120": {"FID_val": 7.25, "CLIP_COCO": 25.69},
}
ROWS = tuple(PAPER)
NOTES = (
    "The architecture is not named; mmDiT, whose numbers in Table 1 (CC12M, 256) are those of "
    "the row of 600k iterations. Sec. 3.4 speaks of 512 pixels, the caption of 256.",
    "Pre-training takes 600k iterations (Sec. 3.4); a sweep does it once for all rows.",
    "FID_train of ImageNet-22k: to a subset of 200k training images (App. C).",
)


def get_config(args: str | None = None):
    """Arguments: init (none | imagenet1k), data (imagenet22k | cc12m), steps (thousands), scale."""
    row = base.arguments(args, init="imagenet1k", data="cc12m", steps=120, scale="paper")
    config = recipes.paper("mmdit", row.data, 256, row.init)
    config.steps = 1000 * row.steps
    return recipes.scaled(config, row.scale)
