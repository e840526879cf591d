r"""A classifier of noised images for classifier guidance (arXiv:2105.05233).

    python -m condiff_jax.main --config=configs/classifier.py --workdir=runs/classifier
    python -m condiff_jax.main --config=configs/classifier_guidance.py --workdir=runs/guided \
      --config.sampling.classifier=runs/classifier

It guides denoisers with the same classes, resolution, noise levels and latents. Minutes on two CPU
cores, no downloads.
"""

from configs import base, quickstart


def get_config(args: str | None = None):
    """Arguments: classes (10: warm or cool shapes | 30: color and shape)."""
    row = base.arguments(args, classes=10)
    config = quickstart.get_config()
    config.objective = "classification"
    config.steps = 2000
    config.batch_size = 32
    config.model.name = "unet"  # its encoder half
    config.model.size = "tiny"
    config.model.unroll = 1
    config.data.semantics = "class"
    config.data.classes = row.classes
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay_after = 2000
    config.optimizer.ema = 0.995
    config.evaluation.metrics = ()
    config.checkpoint.every = 1000
    config.log.samples_every = 1000
    return config
