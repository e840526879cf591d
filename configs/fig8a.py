"""Fig. 8a: positions of 512 pixel models after 256 pixels, resampled or extrapolated.

--config=configs/fig8a.py:position=resample,scale=small
"""

from configs import base, recipes

PAPER = {f"position={position}": {"FID_val": None} for position in ("resample", "extrapolate")}
ROWS = tuple(PAPER)
NOTES = (
    "The curves are an image that our copy of the paper lacks. Sec. 3.4: resampling is better "
    "by 0.2 FID after 130k iterations, which are those of the rows.",
    "All else is ours as in Table 1; both stages place positions in the same way.",
)


def get_config(args: str | None = None):
    """Arguments: position (resample | extrapolate), scale."""
    row = base.arguments(args, position="resample", scale="paper")
    config = recipes.resolution_shift()
    for stage in recipes.all_stages(config):
        stage.model.position = row.position
    return recipes.scaled(config, row.scale)
