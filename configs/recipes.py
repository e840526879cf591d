"""The paper's recipes (Sec. 3.1, App. C), shared by all tables, and their smaller scales."""

from ml_collections import ConfigDict

from configs import base

# Number of classes of the paper's data sets (Sec. 3.1); 0: captions.
CLASSES = {"imagenet1k": 1000, "imagenet22k": 21_841, "cc12m": 0}
# Lowest of Sec. 3.1: 500k to 1M iterations on ImageNet-1k, 300k to 500k on CC12M.
# ImageNet-22k from scratch: Table 4a.
STEPS = {"imagenet1k": 500_000, "imagenet22k": 375_000, "cc12m": 300_000}
PRETRAIN_STEPS = 600_000  # on ImageNet-1k before other data (Table 4a)
# At 512 pixels after 256: the longest that the paper mentions (Fig. 8a); Table 1 gives no number.
FINETUNE_STEPS = 130_000
CROPS = {"global": (0.9, 1.0), "local": (0.4, 0.6), "mix": (0.4, 1.0)}  # Fig. 8c
DIVERGED = float("nan")  # the paper's cross: the run diverged
# gamma_c of Eq. 1 by its name in Tables 2a and A6.
WEIGHTINGS = {
    "zero": {"weighting": "zero"},
    "unif": {"weighting": "uniform"},
    **{f"cos{a}": {"weighting": "cosine", "alpha": float(a)} for a in (1, 2, 4, 8)},
    "linear": {"weighting": "linear"},
    **{f"step{k}": {"weighting": "step", "k": float(k)} for k in (1, 2, 6)},
}
SCALES = ("paper", "small", "tiny")
SHRINK = 16  # resolutions of the smaller scales are divided by it: 256 -> 16
RESOLUTIONS = (
    "data.resolution",
    "model.base_resolution",
    "diffusion.base_resolution",
    "sampling.base_resolution",
)


def paper(arch: str, data: str, resolution: int, init: str = "none") -> ConfigDict:
    """An architecture on Stable Diffusion's latents, as the paper trains it (Sec. 3.1, App. C).

    `ours` has the paper's conditioning and transfer; the baselines have control with uniform
    weights (SDXL's), zero padding, extrapolated positions and no rescaled noise levels. init: none
    | low_res (at 512: the same at 256 pixels) | imagenet1k | imagenet22k.
    """
    base.choose("data", data, CLASSES)
    base.choose("resolution", resolution, (256, 512))
    others = (name for name in ("imagenet1k", "imagenet22k") if name != data)
    base.choose("init", init, ("none", *(("low_res",) if resolution == 512 else ()), *others))
    config = base.get_config()
    text = not CLASSES[data]
    config.steps = STEPS[data]
    config.batch_size = 2048 if resolution == 256 else 384
    config.model.name = arch
    config.model.size = ("text" if text else "class") if arch == "unet" else "XL/2"
    config.model.base_resolution = 256
    config.model.dtype = "bfloat16"
    # docs/plan.md: UNets fit without remat; for the others `dots` is 5% faster but needs memory.
    config.model.remat = "none" if arch == "unet" else "block"
    config.parallel.fsdp = 0
    config.data.name = "tfds"
    config.prepare.builder = data
    config.data.resolution = resolution
    config.data.semantics = "text" if text else "class"
    config.data.classes = CLASSES[data]
    config.data.workers = 8
    # Sec. 3.1 gives 10^-4 for all training and, for 256 pixels, "10 x 10^-4". We take the former,
    # which is usual for these architectures.
    config.optimizer.learning_rate = 1e-4
    config.autoencoder.name = "kl"
    config.autoencoder.scale = 0.18215
    config.text_encoder.name = "clip" if text else "words"
    config.text_encoder.length = 77  # of CLIP ViT-L/14
    config.text_encoder.width = 768
    config.sampling.steps = 250
    config.sampling.guidance = 1.5
    config.sampling.base_resolution = 256  # Eq. 4: 2.0 at 512 pixels
    config.sampling.size = "train"  # Table 2b: the sizes with which Table 2a was measured
    # ImageNet-22k: App. C. CC12M: Table 1 says FID_val.
    references = {"imagenet1k": "train", "imagenet22k": "train_200k", "cc12m": "validation"}
    config.evaluation.reference = references[data]
    config.evaluation.samples = 50_000
    config.evaluation.size_prompts = 10_000  # Sec. 3.1; sizes: Table 2a
    config.evaluation.sizes = (64, 128, 256, 512, 1024)
    if arch == "ours":
        config.conditioning.control = ("crop", "flip", "size")
        config.diffusion.base_resolution = 256  # Eq. 3
        config.sampling.control_guidance = 1.375  # Fig. 7
    else:
        config.conditioning.control = ("crop", "size")  # six scalars, as in Table A1
        config.conditioning.weighting = "uniform"
        config.conditioning.padding = "zero"
        config.model.position = "extrapolate"
    if init == "low_res":
        config.steps = FINETUNE_STEPS
        config.init.pretrain = paper(arch, data, 256)
        if arch == "ours":  # Fig. 8c, Table A3: better at 512 pixels
            config.init.pretrain.data.crop = CROPS["local"]
    elif init != "none":
        config.init.pretrain = paper(arch, init, resolution)
        if init == "imagenet1k":
            config.init.pretrain.steps = PRETRAIN_STEPS
    return config


def weigh(config: ConfigDict, name: str) -> None:
    """Set gamma_c of Eq. 1 by its name in Tables 2a and A6."""
    base.choose("weighting", name, WEIGHTINGS)
    config.conditioning.update(WEIGHTINGS[name])


def weighted(name: str) -> ConfigDict:
    """The model of Tables 2a, 2b and A6 with the weighting `name`."""
    config = paper("ours", "imagenet1k", 256)
    config.steps = 120_000
    config.sampling.control_guidance = 1.0
    # The weighting is for data in which size and content are correlated. In real images they are;
    # in `shapes` only with this field.
    config.data.entangled = 0.9
    weigh(config, name)
    return config


def validated(config: ConfigDict) -> ConfigDict:
    """Set, in place, evaluation on the validation set with 50 steps (Figs. 8 and A2)."""
    config.sampling.steps = 50
    config.evaluation.reference = "validation"
    return config


def resolution_shift() -> ConfigDict:
    """The model of Fig. 8: ours on ImageNet-1k at 512 pixels after 256."""
    return validated(paper("ours", "imagenet1k", 512, "low_res"))


def all_stages(config: ConfigDict) -> list[ConfigDict]:
    """The config followed by those of its earlier stages."""
    earlier = config.init.pretrain
    return [config, *(all_stages(earlier) if earlier else ())]


def scaled(config: ConfigDict, scale: str, keep: tuple[str, ...] = ()) -> ConfigDict:
    """A recipe of `paper` at another scale: paper | small (CPU, an hour) | tiny (a few steps).

    The smaller ones are the same experiment on `shapes`, without files. keep: dotted names of
    fields that the rows of a table vary, which stay as they are.
    """
    base.choose("scale", scale, SCALES)
    if scale == "paper":
        return config
    for stage in all_stages(config):
        unchanged = {field: _get(stage, field) for field in keep}
        _small(stage)
        if scale == "tiny":
            _tiny(stage)
        stage.update_from_flattened_dict(unchanged)
    return config


def _get(config: ConfigDict, field: str):
    for part in field.split("."):
        config = config[part]
    return config


def _small(config: ConfigDict) -> None:
    """Set, in place, 16 pixels for 256, 32 for 512, and configs/quickstart.py's model."""
    text = config.data.semantics == "text"
    # 75,000 for 500k: 40 minutes on two cores; below 6000 the model learns next to nothing
    config.steps = max(6000, config.steps * 3 // 20)
    config.batch_size = 8
    unet = config.model.name == "unet"
    config.model.size = "tiny" if unet else "tiny/4"
    config.model.unroll = 1 if unet else 4
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.parallel.fsdp = 1
    config.update_from_flattened_dict({f: _get(config, f) // SHRINK for f in RESOLUTIONS})
    config.data.name = "shapes"
    config.data.classes = {0: 0, 1000: 10, 21_841: 30}[config.data.classes]
    config.data.sizes = (12, 48)
    config.data.workers = 0
    config.diffusion.prediction = "v"  # see configs/quickstart.py
    config.optimizer.learning_rate *= 20
    config.optimizer.schedule = "rsqrt"
    config.optimizer.decay_after = 9000
    config.optimizer.warmup = 200
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.999
    config.autoencoder.name = "pixels"
    config.autoencoder.scale = 1.0
    config.text_encoder.name = "words"
    config.text_encoder.length = 16
    config.text_encoder.width = 128
    config.sampling.steps = 50 if config.sampling.steps == 250 else 20
    if text:
        config.sampling.guidance = 3.0  # captions of `shapes` have more information than a class
    if config.sampling.control.height:
        config.sampling.control.height /= SHRINK
        config.sampling.control.width /= SHRINK
    config.sampling.size_range = (32, 48)  # above the resolution, within data.sizes
    metrics = ("prompt_accuracy", "frechet_shapes")
    if "size" in config.conditioning.control:
        metrics += ("size_response",)
    config.evaluation.metrics = metrics
    config.evaluation.samples = 1024
    config.evaluation.size_prompts = 16
    config.evaluation.sizes = (12, 16, 24, 36, 48)
    held_out = config.evaluation.reference in ("validation", "coco")
    config.evaluation.reference = "validation" if held_out else "train"
    config.checkpoint.every = 3000
    config.log.every = 100
    config.log.samples_every = 0


def _tiny(config: ConfigDict) -> None:
    """Reduce, in place and after `_small`, compilation and computation to a minimum."""
    config.steps = max(2, config.steps // 3000)  # rows with different steps still differ
    if config.model.name != "unet":
        config.model.size = "tiny/8"
        config.model.unroll = 1
    config.optimizer.warmup = 0
    config.sampling.steps = 2
    config.sampling.n = 4
    config.evaluation.metrics = ()
