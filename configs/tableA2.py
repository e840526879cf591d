"""Table A2: learning rate and batch size (DiT on ImageNet-1k at 256 pixels, 70k iterations).

--config=configs/tableA2.py:learning_rate=1e-4,batch=2048,scale=small
"""

from configs import base, recipes

PAPER = {
    f"learning_rate={rate},batch={batch}": {"FID_train": None}
    for rate in ("5e-5", "1e-4", "2e-4")
    for batch in (512, 1024, 2048)
}
ROWS = tuple(PAPER)
NOTES = (
    "The table is an image that our copy of the paper lacks; the grid is ours: the rate and batch "
    "of Sec. 3.1, and steps of two, as 'another factor of two led to diverging runs'. The caption: "
    "the best is the highest rate that does not diverge, with the largest batch.",
    "The DiT is taken as the one with classes in LayerNorm. Results are without averaged "
    "parameters, with 250 steps.",
    "At the smaller scales the batches are 8, 16 and 32, and rates keep their ratios.",
)


def get_config(args: str | None = None):
    """Arguments: learning_rate, batch (a multiple of 512), scale."""
    row = base.arguments(args, learning_rate=1e-4, batch=2048, scale="paper")
    config = recipes.paper("dit_ln", "imagenet1k", 256)
    config.steps = 70_000
    config.optimizer.learning_rate = row.learning_rate
    config.sampling.ema = False
    config = recipes.scaled(config, row.scale)
    config.batch_size = row.batch if row.scale == "paper" else row.batch // 64
    return config
