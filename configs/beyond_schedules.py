"""Beyond the paper: do Eqs. 1 to 3 help with other noise schedules as well?

--config=configs/beyond_schedules.py:schedule=linear,weighting=cos8,scale=small
--config=configs/beyond_schedules.py:schedule=cosine,rescale=true,scale=small

Rows with `weighting` (Eq. 1) or `control_guidance` (Eq. 2): Table 2a's model at 256 pixels. Rows
with `rescale` (Eq. 3): Fig. 8b's, at 512 pixels after 256.
"""

from configs import base, recipes

SCHEDULES = {  # the paper's, DDPM's, and that of arXiv:2102.09672 (without betas)
    "scaled_linear": {},
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "cosine": {},
}
PAPER = {
    f"schedule={schedule},{choice}": {}  # the paper has one schedule
    for choice in (
        "weighting=unif",
        "weighting=cos8",
        "weighting=cos8,control_guidance=1.375",
        "rescale=true",
        "rescale=false",
    )
    for schedule in SCHEDULES
}
ROWS = tuple(PAPER)
NOTES = ("Both stages of `rescale` have the same schedule; Eq. 3 changes that of the second.",)


def get_config(args: str | None = None):
    """Arguments: schedule, weighting and control_guidance, or rescale; scale.

    schedule: scaled_linear | linear | cosine. weighting: as in Table A6. rescale: true | false.
    """
    row = base.arguments(
        args,
        schedule="scaled_linear",
        weighting="cos8",
        control_guidance=1.0,
        rescale="",
        scale="paper",
    )
    base.choose("schedule", row.schedule, SCHEDULES)
    base.choose("rescale", row.rescale, ("", "true", "false"))
    if row.rescale:
        config = recipes.resolution_shift()
        config.steps = 40_000  # as Fig. 8b
        config.diffusion.base_resolution = 256 if row.rescale == "true" else 0
        recipes.weigh(config, row.weighting)
    else:
        config = recipes.weighted(row.weighting)
        config.sampling.control_guidance = row.control_guidance
    for stage in recipes.all_stages(config):
        stage.diffusion.schedule = row.schedule
        stage.diffusion.update(SCHEDULES[row.schedule])
    return recipes.scaled(config, row.scale)
