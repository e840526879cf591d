"""Reporters of training runs, by objective."""

from condiff_jax.training.reporters import autoencoder, classifier, diffusion

REPORTERS = {
    "diffusion": diffusion.Reporter,
    "reconstruction": autoencoder.Reporter,
    "classification": classifier.Reporter,
}
