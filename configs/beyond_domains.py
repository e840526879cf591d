"""Beyond the paper: does pre-training help between unlike domains (Sec. 3.4 has photographs)?

--config=configs/beyond_domains.py:data=emoji,init=shapes,path=DATA,scale=small

`shapes` is embedded; DATA is a folder of webdataset tars with small captioned images, such as
emoji. Both are at 32 pixels, with captions.
"""

from configs import base, recipes

PAPER = {  # no such numbers
    f"data={data},init={init}": {}
    for data, other in (("emoji", "shapes"), ("shapes", "emoji"))
    for init in ("none", other)
}
ROWS = tuple(PAPER)
NOTES = (
    "Both data sets are small: scale=paper is a model of the size S for a GPU.",
    "Every stage takes the same number of steps. path= is needed wherever emoji are.",
)


def _stage(data: str, path: str, scale: str):
    config = recipes.scaled(
        recipes.paper("ours", "cc12m", 512), "tiny" if scale == "tiny" else "small"
    )
    if scale != "tiny":
        config.steps = 20_000
    if scale == "paper":
        config.batch_size = 64
        config.model.size = "S/4"
        config.model.dtype = "bfloat16"
        config.model.unroll = 1
        config.optimizer.learning_rate = 5e-4
    if data == "emoji":
        config.data.name = "webdataset"
        config.data.path = path
        config.evaluation.metrics = ()
    return config


def get_config(args: str | None = None):
    """Arguments: data (emoji | shapes), init (none | shapes | emoji), path, scale."""
    row = base.arguments(args, data="shapes", init="none", path="", scale="paper")
    base.choose("scale", row.scale, recipes.SCALES)
    base.choose("data", row.data, ("emoji", "shapes"))
    base.choose("init", row.init, ("none", "emoji" if row.data == "shapes" else "shapes"))
    config = _stage(row.data, row.path, row.scale)
    if row.init != "none":
        config.init.pretrain = _stage(row.init, row.path, row.scale)
    return config
