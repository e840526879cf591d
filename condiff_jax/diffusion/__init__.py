"""Diffusion as functions of callables: schedules, loss, guidance and samplers, on JAX alone.

A denoiser is any function denoise(x_t, t, cond) -> eps.

- Schedules: `Schedule` holds alpha_bar; `scaled_linear`, `linear` and `cosine` (by name in
  `SCHEDULES`) create one, and `rescale` adapts one to another resolution (Eq. 3).
- Predictions: `predict_epsilon` makes a denoiser of a network that predicts epsilon or v, and
  `loss_weight` is the matching weight of the loss.
- Training: `draw_timesteps` and `add_noise` create noised samples, and `denoising_loss` is the loss
  of each sample (Eqs. 5 and 6).
- Guidance: `dual_guidance` (Eq. 2), `classifier_free_guidance`, `implicit_classifier_guidance` and
  `classifier_guidance` wrap a denoiser, `classifier_gradient` guides stochastic samplers, and
  `scaled_guidance` adapts the scale to upsampling (Eq. 4).
- Samplers: `ddim` and `ddpm` (by name in `SAMPLERS`) go from `initial_noise` to x_0 along
  `timesteps`.
"""

from condiff_jax.diffusion.guidance import (
    classifier_free_guidance,
    classifier_gradient,
    classifier_guidance,
    dual_guidance,
    implicit_classifier_guidance,
    scaled_guidance,
)
from condiff_jax.diffusion.loss import add_noise, denoising_loss, draw_timesteps
from condiff_jax.diffusion.prediction import PREDICTIONS, loss_weight, predict_epsilon
from condiff_jax.diffusion.sampler import (
    SAMPLERS,
    SPACINGS,
    ddim,
    ddpm,
    initial_noise,
    timesteps,
)
from condiff_jax.diffusion.schedule import (
    SCHEDULES,
    Schedule,
    cosine,
    linear,
    rescale,
    scaled_linear,
)

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "Schedule",
    "add_noise",
    "classifier_free_guidance",
    "classifier_gradient",
    "classifier_guidance",
    "cosine",
    "ddim",
    "ddpm",
    "denoising_loss",
    "draw_timesteps",
    "dual_guidance",
    "implicit_classifier_guidance",
    "initial_noise",
    "linear",
    "loss_weight",
    "predict_epsilon",
    "rescale",
    "scaled_guidance",
    "scaled_linear",
    "timesteps",
]
