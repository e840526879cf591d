"""The paper's model at a tiny size on the embedded data: minutes on two CPU cores, no downloads."""

from configs import base


def get_config(args: str | None = None):
    """No arguments."""
    base.arguments(args)
    config = base.get_config()
    config.steps = 850
    config.batch_size = 32
    config.model.size = "tiny/2"
    config.data.resolution = 16
    config.data.sizes = (12, 48)
    # Epsilon prediction weighs errors of the picture by 1 / sigma^2, so most of the loss is about
    # textures at low noise levels. Eq. 3 shifts the schedule to levels where captions matter.
    config.diffusion.base_resolution = 4
    config.text_encoder.length = 16
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup = 50
    config.optimizer.b2 = 0.95
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.995
    config.sampling.steps = 20
    config.sampling.guidance = 3.0
    config.sampling.control_guidance = 1.375
    config.evaluation.prompts = 256
    config.checkpoint.every = 400
    config.log.samples_every = 400
    return config
