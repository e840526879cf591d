r"""CIFAR-10 conditioning benchmark: which class conditioning of a UNet gives the best FID?

--config=configs/cifar10_conditioning.py:method=film,size=small --config.data.path=CIFAR10 \
  --config.evaluation.inception=WEIGHTS
--config=configs/cifar10_conditioning.py:method=weighted_attn,size=small,scale=small

A method is a module of condiff_jax/models/conditioners, by its file name.
"""

from configs import base

SOURCE = "benchmark"
SIZES = ("small", "medium", "large")
# Sizes at the smaller scales: a quarter of the width, one block per level.
NARROW = {"small": "tiny", "medium": "tiny2", "large": "tiny4"}
_PUBLISHED = {
    "film": (19.39, 11.50, 10.52),
    "cross_attn": (19.17, 11.21, 10.41),
    "adanorm": (20.01, 12.31, 11.77),
    "weighted_attn": (None, None, None),
    "ours_none": (None, None, None),
}
PAPER = {
    f"method={method},size={size}": {"fid": value}
    for method, values in _PUBLISHED.items()
    for size, value in zip(SIZES, values, strict=True)
}
ROWS = tuple(PAPER)
# The benchmark's best results by language models, each with its own method.
CITED = {
    "agent, claude-opus-4.6": {"small": 19.16, "medium": 11.44, "large": 9.93},
    "agent, deepseek-reasoner": {"small": 19.53, "medium": 11.15, "large": 10.43},
    "agent, gemini-3.1-pro-preview": {"small": 19.10, "medium": 11.43, "large": 11.11},
    "agent, qwen3.6-plus": {"small": 19.23, "medium": 11.27, "large": 10.37},
}
NOTES = (
    "Not of the paper: a public benchmark, whose page gives the networks' widths, batches, steps, "
    "optimizer, average, sampler and FID (of clean-fid, with the 50,000 training pictures), and "
    "the numbers of its three baselines. Our copy has none of its code.",
    "Chosen by us, as the page says nothing: no flips, DDPM's noise levels (linear, 1e-4 to 0.02) "
    "and epsilon, AdamW's weight decay 0.01, trailing steps of DDIM, 50,000 pictures for FID, a "
    "class table with a null row, residual branches that start at zero.",
    "film adds the class to the time embedding, which the backbone's blocks add in turn; the page "
    "calls that adaptive GroupNorm (scale and shift), for which the published sizes have too few "
    "parameters.",
    "cross_attn attends to one token, so its queries and keys change nothing; the page names no "
    "number of tokens. weighted_attn and ours_none are ours: no published numbers.",
    "At the smaller scales all is a quarter as wide with one block a level, on `shapes` at 32 "
    "pixels, and v is predicted.",
)


def get_config(args: str | None = None):
    """Arguments: method (a module of models/conditioners), size, scale."""
    row = base.arguments(args, method="film", size="small", scale="paper")
    base.choose("size", row.size, SIZES)
    base.choose("scale", row.scale, ("paper", "small", "tiny"))
    config = base.get_config()
    config.steps = 35_000
    config.batch_size = 64 if row.size == "large" else 128
    config.model.name = "unet2d"
    config.model.size = row.size
    config.model.conditioner = row.method
    config.data.name = "cifar10"
    config.data.semantics = "class"
    config.data.classes = 10
    config.data.crop = (1.0, 1.0)
    config.data.flip = False
    config.conditioning.control = ()
    config.conditioning.alpha = 1.0  # only of weighted_attn: details act from early noise levels on
    config.conditioning.drop_semantics = 0.0
    config.conditioning.drop_control = 0.0
    config.diffusion.schedule = "linear"
    config.diffusion.beta_start = 1e-4
    config.diffusion.beta_end = 0.02
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.ema = 0.9995
    config.sampling.steps = 50
    config.sampling.guidance = 1.0
    config.evaluation.metrics = ("fid",)
    config.evaluation.samples = 50_000
    config.evaluation.resize = "clean"
    config.checkpoint.every = 5000
    config.log.samples_every = 5000
    if row.scale != "paper":
        _small(config)
    if row.scale == "tiny":
        config.steps = 2
        config.sampling.steps = 2
        config.sampling.n = 4
        config.evaluation.metrics = ()
    return config


def _small(config) -> None:
    """Change a config in place to half an hour on a slow CPU core, without files."""
    config.steps = 6000  # after 2000 many images are still noise
    config.batch_size = 8
    config.model.size = NARROW[config.model.size]
    config.data.name = "shapes"
    config.data.resolution = 32
    config.data.sizes = (32, 64)
    config.diffusion.prediction = "v"  # see configs/quickstart.py
    config.optimizer.learning_rate = 2e-3
    config.optimizer.schedule = "cosine"
    config.optimizer.warmup = 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.99
    config.sampling.steps = 20
    config.sampling.size_range = (32, 64)
    config.evaluation.metrics = ("prompt_accuracy", "frechet_shapes")
    config.evaluation.prompts = 250
    config.evaluation.samples = 512
    config.evaluation.sizes = (32, 48, 64)
    config.checkpoint.every = 1000
    config.log.samples_every = 0
