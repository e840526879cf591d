"""Patch discriminator: one logit per patch, which depends on its own image only."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import parity
from condiff_jax.models.discriminator import PatchDiscriminator

MODEL = PatchDiscriminator((8, 16))
X = np.random.default_rng(0).normal(size=(3, 32, 48, 3)).astype(np.float32)


def test_logits_are_of_patches_and_of_one_image():
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params = parity.random_like(shapes)
    run = parity.jit(lambda x: MODEL.apply({"params": params}, x))
    logits = run(X)
    assert logits.shape == (3, 8, 12)
    # GroupNorm depends on the whole image, but on no other image.
    np.testing.assert_allclose(run(X[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(X[::-1]), logits[::-1], rtol=1e-4, atol=1e-5)
    assert np.abs(logits[0] - logits[1]).max() > 1e-2
