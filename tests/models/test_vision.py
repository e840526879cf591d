"""Stages have the original shapes; tests/pretrained/test_lpips.py checks their values."""

import jax
import jax.numpy as jnp
import pytest

from condiff_jax.models.vision import MIN_SIDE, AlexNet, Vgg16


@pytest.mark.parametrize(
    ("side", "sides"), [(224, (55, 27, 13, 13, 13)), (MIN_SIDE, (15, 7, 3, 3, 3))]
)
def test_stages_of_alexnet(side, sides):
    x = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    stages, variables = jax.eval_shape(AlexNet().init_with_output, jax.random.key(0), x)
    widths = (64, 192, 384, 256, 256)
    assert [s.shape for s in stages] == [(2, n, n, c) for n, c in zip(sides, widths, strict=True)]
    # AlexNet's convolutions, without its three linear layers.
    assert sum(a.size for a in jax.tree.leaves(variables)) == 2_469_696


def test_stages_of_vgg16():
    x = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    stages, variables = jax.eval_shape(Vgg16().init_with_output, jax.random.key(0), x)
    sizes = ((224, 64), (112, 128), (56, 256), (28, 512), (14, 512))
    assert [s.shape for s in stages] == [(2, n, n, c) for n, c in sizes]
    # The original's convolutions, without its three linear layers.
    assert sum(a.size for a in jax.tree.leaves(variables)) == 14_714_688
