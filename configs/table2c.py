"""Table 2c: control of crops alone, and of crops and flips (CC12M at 256 pixels).

--config=configs/table2c.py:control=crop+flip,scale=small
"""

from configs import base, recipes

PAPER = {
    "control=crop": {"FID_val": None, "CLIP_COCO": None},
    "control=crop+flip": {"FID_val": None, "CLIP_COCO": None},
}
ROWS = tuple(PAPER)
NOTES = (
    "The table is an image that our copy of the paper lacks. Sec. 3.3: flip conditioning slightly "
    "improves FID and CLIP over crop conditioning alone. Table A3 has 7.32 and 26.13 before "
    "flip conditioning, 7.19 and 26.25 with it.",
    "Pictures are flipped at random in both rows; the size is not among the conditions.",
)


def get_config(args: str | None = None):
    """Arguments: control (groups joined by +, of crop, flip, size), scale."""
    row = base.arguments(args, control="crop+flip", scale="paper")
    config = recipes.paper("ours", "cc12m", 256)
    config.steps = 124_000
    config.conditioning.padding = "zero"  # Table A3 adds noisy padding later
    config.conditioning.control = tuple(row.control.split("+"))
    return recipes.scaled(config, row.scale)
