"""Registry of objectives, by `config.objective`."""

from __future__ import annotations

from condiff_jax.config.schema import Config
from condiff_jax.objectives import classification, diffusion, reconstruction
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.vocabulary import Vocabulary

OBJECTIVES = {
    "diffusion": diffusion.create,
    "reconstruction": reconstruction.create,
    "classification": classification.create,
}


def create_objective(config: Config, vocabulary: Vocabulary) -> Objective:
    """Create the objective of a config; nothing is allocated."""
    return OBJECTIVES[config.objective](config, vocabulary)
