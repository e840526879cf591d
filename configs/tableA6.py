"""Table A6: other weightings of the size condition beside the cosine's powers (Table 2a).

--config=configs/tableA6.py:weighting=step6,scale=small
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
    "weighting=linear": {"FID_train": 3.13, "LPIPS": 0.07, "LPIPS/HR": 0.041},
    "weighting=step1": {"FID_train": 3.15, "LPIPS": 0.09, "LPIPS/HR": 0.046},
    "weighting=step2": {"FID_train": 3.12, "LPIPS": 0.14, "LPIPS/HR": 0.062},
    "weighting=step6": {"FID_train": 3.09, "LPIPS": 0.26, "LPIPS/HR": 0.170},
}
ROWS = tuple(PAPER)
NOTES = (
    "All as in Table 2a, whose rows these repeat.",
    "step: 1 where sigma_t is at most 1, 2 or 6; linear: 1 - t / T, as the paper gives no formula.",
)


def get_config(args: str | None = None):
    """Arguments: weighting (a name of recipes.WEIGHTINGS), scale."""
    row = base.arguments(args, weighting="cos8", scale="paper")
    return recipes.scaled(recipes.weighted(row.weighting), row.scale)
