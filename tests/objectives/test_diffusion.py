"""The diffusion objective passes the values of config fields to its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.conditioning.text import channel_std
from condiff_jax.diffusion.schedule import scaled_linear
from condiff_jax.models.layers import position_embedding
from tests import tiny

SIGMA = scaled_linear().sigma  # of base.py's schedule
T = jnp.arange(0, 1000, 37)


@pytest.mark.parametrize("beta", [0.0, 0.02, 0.32])
def test_text_is_padded_with_noise_of_the_variance_beta_txt(beta):
    """Eq. 7: 3 of 8 tokens are repeated ceil(8 / 3) = 3 times, so the noise is twice beta_txt's."""
    objective = tiny.objective(tiny.config(**{"conditioning.beta_txt": beta}))
    batch = objective.example(1)
    batch["mask"] = np.arange(8)[None] < 3
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(1, 8, 16)).astype(np.float32)
    batch |= {"tokens": tokens, "pooled": tokens[:, 0]}  # as in a cache of mode encode
    noise = rng.normal(size=(1, 8, 16)).astype(np.float32)
    text = objective.condition({}, batch, noise).semantics
    expected = np.sqrt(2 * beta) * channel_std(text.replace(tokens=tokens)) * noise
    repeated = tokens[:, np.arange(8) % 3]
    np.testing.assert_allclose(text.tokens - repeated, expected, atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 8.0])
def test_the_power_of_the_cosine_is_alpha(alpha):
    fields = {"conditioning.weighting": "cosine", "conditioning.alpha": alpha}
    gamma = tiny.objective(tiny.config(**fields)).model.weighting(T)
    np.testing.assert_allclose(gamma, np.cos(np.pi * T / 2000) ** alpha, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("base", [8, 64])
def test_noise_levels_are_for_the_resolution_of_the_data(base):
    """Eq. 3, sigma' = sigma s' / s from the base s to the data's s' = 16."""
    objective = tiny.objective(tiny.config(**{"diffusion.base_resolution": base}))
    np.testing.assert_allclose(objective.schedule.sigma, SIGMA * 16 / base, rtol=1e-6)


@pytest.mark.parametrize("base, scale", [(0, 1.0), (8, 2.0), (64, 0.25)])
@pytest.mark.parametrize("k", [1.0, 2.0])
def test_step_weighting_uses_the_noise_levels_of_training(base, scale, k):
    """Table A6: 1[sigma_t <= k], with the noise levels of Eq. 3."""
    fields = {"diffusion.base_resolution": base, "conditioning.weighting": "step"}
    objective = tiny.objective(tiny.config(**fields, **{"conditioning.k": k}))
    gamma = objective.model.weighting(jnp.arange(1000))
    np.testing.assert_array_equal(gamma, scale * SIGMA <= k)


@pytest.mark.parametrize("base, grid", [(0, 4), (8, 2), (32, 8)])
def test_positions_span_the_grid_of_the_models_base_resolution(base, grid):
    """Patches of 4 pixels; the model's own resolution is 16."""
    fields = {"model.base_resolution": base, "model.position": "resample"}
    objective = tiny.objective(tiny.config(**fields))
    expected = position_embedding(objective.model.width, 4, 4, base=grid)
    x = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    np.testing.assert_array_equal(objective.model.positions(x), expected)
