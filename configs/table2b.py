"""Table 2b: size control of samples, with uniform and cosine weights (ImageNet-1k, 256).

--config=configs/table2b.py:size=untied,weighting=cos8,scale=small

The models are two of Table 2a; rows with the same weighting differ in sampling alone.
"""

from configs import base, recipes

PAPER = {
    "size=512,weighting=unif": {"FID_train": 4.48},
    "size=512,weighting=cos8": {"FID_train": 4.12},
    "size=tied,weighting=unif": {"FID_train": 5.04},
    "size=tied,weighting=cos8": {"FID_train": 3.80},
    "size=untied,weighting=unif": {"FID_train": 4.51},
    "size=untied,weighting=cos8": {"FID_train": 3.90},
    "size=train,weighting=unif": {"FID_train": 3.08},
    "size=train,weighting=cos8": {"FID_train": 3.04},
}
ROWS = tuple(PAPER)
NOTES = (
    "The model is that of Table 2a, as the equal FIDs of size=train tell.",
    "tied: a = b uniform in [512, 1024]; untied: a and b each. At the smaller scales 512 is 32 "
    "and 1024 is 48, the largest size of the training data.",
)


def get_config(args: str | None = None):
    """Arguments: size (512 | tied | untied | train), weighting (as in Table 2a), scale."""
    row = base.arguments(args, size="train", weighting="cos8", scale="paper")
    base.choose("size", row.size, ("512", "tied", "untied", "train"))
    config = recipes.weighted(row.weighting)
    config.sampling.size = row.size
    if row.size == "512":
        config.sampling.size = "fixed"
        config.sampling.control.height = config.sampling.control.width = 512.0
    return recipes.scaled(config, row.scale)
