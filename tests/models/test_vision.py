"""AlexNet's stages have the shapes of the original; tests/metrics/test_lpips.py has its numbers."""

import jax
import jax.numpy as jnp
import pytest

from condiff_jax.models.vision import LEAST_SIDE, AlexNet


@pytest.mark.parametrize(
    ("side", "sides"), [(224, (55, 27, 13, 13, 13)), (LEAST_SIDE, (15, 7, 3, 3, 3))]
)
def test_stages_have_the_originals_shapes(side, sides):
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    stages, variables = jax.eval_shape(AlexNet().init_with_output, jax.random.key(0), x)
    widths = (64, 192, 384, 256, 256)
    assert [s.shape for s in stages] == [(2, n, n, c) for n, c in zip(sides, widths, strict=True)]
    # AlexNet's convolutions, without its three linear layers.
    assert sum(a.size for a in jax.tree.leaves(variables)) == 2_469_696
