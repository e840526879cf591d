"""The paper's model on small real images with captions: webdataset tars in data.path.

Meant for emoji-sized sets (a few thousand 64 px PNGs with alpha, captions of 1 to 14 words).
"""

from configs import base


def get_config(args: str | None = None):
    """Arguments: space (pixels | kl | vq: latents of configs/autoencoder.py:data=emoji,reg=...).

    Set --config.data.path to the folder of tar shards.
    """
    row = base.arguments(args, space="pixels")
    base.choose("space", row.space, ("pixels", "kl", "vq"))
    config = base.get_config()
    config.steps = 20_000
    config.batch_size = 8  # see configs/quickstart.py
    config.model.size = "tiny/4"
    config.model.unroll = 4
    config.data.name = "webdataset"
    config.data.resolution = 64
    config.data.crop = (0.9, 1.0)
    config.data.flip = True
    config.diffusion.prediction = "v"  # learns layout sooner, see configs/quickstart.py
    if row.space == "pixels":
        config.autoencoder.scale = 2.0
        # Noise levels for latents of unit variance leave the layout of images visible at t = T;
        # Eq. 3 from 16 to 64 pixels hides it, so that the model has to use the text.
        config.diffusion.base_resolution = 16
    else:
        config.autoencoder.name = row.space
        config.autoencoder.size = "tiny"
        config.autoencoder.path = "runs/autoencoder/autoencoder"
        config.model.size = "tiny/2"  # 8 x 8 tokens
    config.text_encoder.length = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.schedule = "rsqrt"
    config.optimizer.warmup = 200
    config.optimizer.clip_norm = 1.0
    config.optimizer.ema = 0.999
    config.sampling.steps = 30
    config.sampling.guidance = 3.0
    config.sampling.control_guidance = 1.375
    config.checkpoint.every = 500
    config.log.samples_every = 1000
    return config
