"""The paper's model at a tiny size on the embedded data: minutes on two CPU cores, no downloads."""

from configs import base


def get_config(args: str | None = None):
    """No arguments."""
    base.arguments(args)
    config = base.get_config()
    config.steps = 700
    config.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 50
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.995
    config.autoencoder.scale = 2.0
    config.sampling.steps = 20
    config.sampling.guidance = 3.0
    config.sampling.control_guidance = 1.375
    config.evaluation.prompts = 256
    config.checkpoint.every = 200
    config.log.samples_every = 200
    return config
