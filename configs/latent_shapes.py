r"""Latent diffusion on the embedded data, without any download.

The autoencoder is trained first:

    python -m condiff_jax.main --config=configs/autoencoder.py --workdir=runs/autoencoder
    python -m condiff_jax.main --config=configs/latent_shapes.py --workdir=runs/latent \
      --config.autoencoder.path=runs/autoencoder/autoencoder
"""

from configs import base, quickstart


def get_config(args: str | None = None):
    """Arguments: reg (kl | vq, that of the autoencoder)."""
    row = base.arguments(args, reg="kl")
    base.choose("reg", row.reg, ("kl", "vq"))
    config = quickstart.get_config()
    config.autoencoder.name = row.reg
    config.autoencoder.size = "tiny"
    config.autoencoder.path = "runs/autoencoder/autoencoder"
    config.data.resolution = 32
    config.data.sizes = (24, 96)
    config.model.size = "tiny/2"  # 4 x 4 tokens, as in quickstart
    return config
