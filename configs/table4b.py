"""Table 4b: ImageNet-22k, then CC12M, within one budget (512 pixels); iterations in thousands.

--config=configs/table4b.py:pretrain=200,finetune=150,scale=small
"""

from configs import base, recipes

PAPER = {
    f"pretrain={pretrain},finetune={350 - pretrain}": {"FID_val": None, "CLIP_COCO": None}
    for pretrain in (100, 200, 300)
}
ROWS = tuple(PAPER)
NOTES = (
    "The table is an image that our copy of the paper lacks. Sec. 3.4 names 200k + 150k, which "
    "is better than spending the bulk on pre-training; the other divisions are ours.",
    "The architecture is not named; mmDiT, as in Table 4a.",
)


def get_config(args: str | None = None):
    """Arguments: pretrain (on ImageNet-22k), finetune (on CC12M), scale."""
    row = base.arguments(args, pretrain=200, finetune=150, scale="paper")
    config = recipes.paper("mmdit", "cc12m", 512, "imagenet22k")
    config.steps = 1000 * row.finetune
    config.init.pretrain.steps = 1000 * row.pretrain
    return recipes.scaled(config, row.scale)
