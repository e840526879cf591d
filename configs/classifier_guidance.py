r"""Classifier guidance on the embedded data: accuracy of the class by the guidance's weight.

    python -m condiff_jax.main --config=configs/classifier.py --workdir=runs/classifier
    python -m condiff_jax.main --config=configs/classifier_guidance.py --workdir=runs/guided
    python -m condiff_jax.main --config=configs/classifier_guidance.py --workdir=runs/guided \
      --mode=evaluate --config.sampling.classifier=runs/classifier \
      --config.evaluation.grid="guidance=0,1;classifier_guidance=0,1,2,4,8"
    python -m condiff_jax.main --mode=report --workdir=runs/guided --html=guided.html

The denoiser is trained with the class dropped from one image in ten. With guidance=0 (Eq. 2) it is
unconditional and only the classifier conditions on the class; with guidance=1 both do.
"""

from configs import base, quickstart


def get_config(args: str | None = None):
    """Arguments: classes (10: warm or cool shapes | 30: color and shape)."""
    row = base.arguments(args, classes=10)
    config = quickstart.get_config()
    config.steps = 20_000
    config.data.semantics = "class"
    config.data.classes = row.classes
    config.sampling.guidance = 1.0
    config.sampling.control_guidance = 1.0
    config.evaluation.prompts = 250
    return config
