"""Fig. A2: momenta of Adam (UNet on ImageNet-1k at 256 pixels, 70k iterations).

--config=configs/figA2.py:b1=0.9,b2=0.95,scale=small
"""

from configs import base, recipes

PAPER = {
    f"b1={b1},b2={b2}": {"FID_val": None} for b1 in (0.9, 0.95) for b2 in (0.9, 0.95, 0.99, 0.999)
}
PAPER["b1=0.9,b2=0.999"] = {"FID_val": 26.43}
ROWS = tuple(PAPER)
NOTES = (
    "The figure is an image that our copy of the paper lacks; the grid is ours. App. C: 26.43 for "
    "PyTorch's defaults (0.9, 0.999), and the best, better by 4.78, for (0.9, 0.95).",
)


def get_config(args: str | None = None):
    """Arguments: b1, b2, scale."""
    row = base.arguments(args, b1=0.9, b2=0.999, scale="paper")
    config = recipes.validated(recipes.paper("unet", "imagenet1k", 256))
    config.steps = 70_000
    config.optimizer.b1, config.optimizer.b2 = row.b1, row.b2
    return recipes.scaled(config, row.scale, keep=("optimizer.b1", "optimizer.b2"))
