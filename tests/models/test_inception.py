"""Inception-v3: resize and weight names; test_feature_networks.py checks its values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import torch_inception
from condiff_jax.models import inception
from condiff_jax.pretrained.layout import to_torch


def random_images(height, width, n=1):
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def shapes():
    x = jnp.zeros((1, 299, 299, 3))
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (512, 512), (40, 500)])
def test_resize_is_that_of_tensorflow_1(size):
    images = random_images(*size)
    resized = inception.resize(images)
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, torch_inception.resize(images), atol=255 * 3e-5)
    if size == (299, 299):
        np.testing.assert_array_equal(resized, images)


def zeros(leaf):
    return np.broadcast_to(np.float32(0), leaf.shape)


def test_names_and_sizes_are_the_published_ones(shapes):
    tensors = to_torch(jax.tree.map(zeros, shapes))
    # 94 convolutions with four vectors each, and the classifier of 1008 classes.
    assert len(tensors) == 94 * 5 + 2
    assert sum(a.size for a in tensors.values()) == 23_885_392
    expected = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_6c.branch7x7dbl_4.conv.weight": (160, 160, 7, 1),
        "Mixed_7b.branch3x3dbl_3b.bn.running_var": (384,),
        "fc.weight": (1008, 2048),
    }
    assert {name: tensors[name].shape for name in expected} == expected
