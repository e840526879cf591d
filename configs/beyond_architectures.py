"""Beyond the paper: uniform and cosine weights of the size condition in every architecture.

--config=configs/beyond_architectures.py:arch=unet,data=cc12m,weighting=cos8,scale=small

Table 2a compares the weights in one architecture. All train on ImageNet-1k, and those that take
captions on CC12M.
"""

from configs import base, recipes

CLASSES = ("unet", "dit_ln", "dit_att", "mdtv2", "pixart", "mmdit", "ours")
CAPTIONS = ("unet", "dit_att", "pixart", "mmdit", "ours")
PAPER = {
    f"arch={arch},data={data},weighting={weighting}": {}  # the paper has no such numbers
    for data, archs in (("imagenet1k", CLASSES), ("cc12m", CAPTIONS))
    for arch in archs
    for weighting in ("unif", "cos8")
}
ROWS = tuple(PAPER)
NOTES = (
    "As Table 2a (120k iterations, control guidance 1), but all hear crop and size alone; each "
    "architecture keeps its padding of text.",
)


def get_config(args: str | None = None):
    """Arguments: arch, data (imagenet1k | cc12m), weighting (as in Table A6), scale."""
    row = base.arguments(args, arch="ours", data="imagenet1k", weighting="cos8", scale="paper")
    config = recipes.paper(row.arch, row.data, 256)
    config.steps = 120_000
    config.conditioning.control = ("crop", "size")
    config.sampling.control_guidance = 1.0
    config.data.entangled = 0.9  # see recipes.weighted
    recipes.weigh(config, row.weighting)
    return recipes.scaled(config, row.scale)
