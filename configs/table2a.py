"""Table 2a: weighting of the size condition (gamma_c of Eq. 1) on ImageNet-1k at 256 pixels.

--config=configs/table2a.py:weighting=cos8,scale=small
"""

from configs import base, recipes

# LPIPS: over sizes 64 to 1024; LPIPS/HR: without 64 and 128.
PAPER = {
    "weighting=zero": {"FID_train": 3.29, "LPIPS": None, "LPIPS/HR": None},
    "weighting=unif": {"FID_train": 3.08, "LPIPS": 0.33, "LPIPS/HR": 0.210},
    "weighting=cos1": {"FID_train": 3.08, "LPIPS": 0.23, "LPIPS/HR": 0.076},
    "weighting=cos2": {"FID_train": 3.09, "LPIPS": 0.18, "LPIPS/HR": 0.045},
    "weighting=cos4": {"FID_train": 3.05, "LPIPS": 0.13, "LPIPS/HR": 0.025},
    "weighting=cos8": {"FID_train": 3.04, "LPIPS": 0.04, "LPIPS/HR": 0.009},
}
ROWS = tuple(PAPER)
NOTES = (
    "The architecture is not named; ours, of which alone the weighting changes.",
    "zero: Sec. 3.3 calls it 'without control conditioning'. Here the size is not heard (gamma_c "
    "is 0), crops and flips are. The paper leaves its LPIPS empty.",
    "The column Init. ('zero.' in all rows) is not explained; E_h and E_l start at zero here.",
    "Control guidance is 1: Fig. 7 studies it later. Sizes are the training data's, as the FID "
    "of Table 2b tells.",
)


def get_config(args: str | None = None):
    """Arguments: weighting (a name of recipes.WEIGHTINGS), scale."""
    row = base.arguments(args, weighting="cos8", scale="paper")
    return recipes.scaled(recipes.weighted(row.weighting), row.scale)
