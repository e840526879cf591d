"""An autoencoder for latent diffusion, trained from scratch in minutes on two CPU cores.

--config=configs/autoencoder.py:reg=vq

No downloads. The result, DIR/autoencoder, is autoencoder.path of configs/latent_shapes.py and
others; diffusers reads it too. Set evaluation.lpips for sharper images.
"""

from configs import base


def get_config(args: str | None = None):
    """Arguments: reg (kl | vq), data (shapes | emoji, with --config.data.path)."""
    row = base.arguments(args, reg="kl", data="shapes")
    base.choose("reg", row.reg, ("kl", "vq"))
    base.choose("data", row.data, ("shapes", "emoji"))
    config = base.get_config()
    config.objective = "reconstruction"
    config.steps = 2000
    config.batch_size = 16
    config.autoencoder.name = row.reg
    config.autoencoder.size = "tiny"  # 4 x smaller, 4 channels
    config.model.size = "tiny/1"  # not trained here
    config.data.resolution = 32
    config.data.sizes = (24, 96)
    if row.data == "emoji":
        config.data.name = "webdataset"
        config.data.resolution = 64
    config.reconstruction.critic_start = 1000
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup = 100
    config.optimizer.b1 = 0.5  # usual with a discriminator
    config.optimizer.b2 = 0.9
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.995
    config.checkpoint.every = 1000
    config.log.samples_every = 500
    return config
