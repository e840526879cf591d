"""Fig. 7: guidance at 256 and 512 pixels (Eq. 4), and control guidance (beta of Eq. 2).

--config=configs/fig7.py:resolution=512,guidance=2.0,scale=small

Rows differ in sampling alone, so one training of each resolution serves all of its rows.
"""

from configs import base, recipes

PAPER = {
    **{
        f"resolution={resolution},guidance={guidance}": {"FID_train": None}
        for resolution in (256, 512)
        for guidance in (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    },
    **{
        f"resolution=256,control_guidance={beta}": {"FID_train": None}
        for beta in (1.125, 1.25, 1.375, 1.5, 1.75, 2.0)
    },
}
ROWS = tuple(PAPER)
NOTES = (
    "The curves are an image that our copy of the paper lacks; the values of the axes are ours. "
    "The text gives the best: guidance 1.5 at 256 and 2.0 at 512 pixels, control guidance 1.375.",
    "Data and model are not named; ImageNet-1k and ours. Guidance is swept without control "
    "guidance, control guidance at guidance 1.5 (its value 1 is the row of guidance 1.5).",
)


def get_config(args: str | None = None):
    """Arguments: resolution (256 | 512), guidance, control_guidance, scale.

    guidance is used as it is, without Eq. 4.
    """
    row = base.arguments(args, resolution=256, guidance=1.5, control_guidance=1.0, scale="paper")
    init = "low_res" if row.resolution == 512 else "none"
    config = recipes.paper("ours", "imagenet1k", row.resolution, init)
    config.sampling.guidance = row.guidance
    config.sampling.base_resolution = 0
    config.sampling.control_guidance = row.control_guidance
    return recipes.scaled(config, row.scale)
