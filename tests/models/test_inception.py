"""Inception-v3 is the network of FID: resize, features, logits, and the names of its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import jit
from condiff_jax.convert.layout import from_torch, to_torch
from condiff_jax.models import inception
from tests import torch_inception


def pictures(height, width, n=1):
    rng = np.random.default_rng(height)
    return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def shapes():
    x = jnp.zeros((1, 299, 299, 3))
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), x)["params"]


@pytest.mark.parametrize("size", [(32, 32), (256, 256), (299, 299), (512, 512), (40, 500)])
def test_resize_is_that_of_tensorflow_1(size):
    images = pictures(*size)
    resized = inception.resize(images)
    assert resized.dtype == jnp.float32
    np.testing.assert_allclose(resized, torch_inception.resize(images), atol=255 * 3e-5)
    if size == (299, 299):
        np.testing.assert_array_equal(resized, images)


def test_network_equals_the_one_in_pytorch(shapes):
    empty = {name: a.shape for name, a in to_torch(jax.tree.map(zeros, shapes)).items()}
    state = torch_inception.random_state(empty)
    params = from_torch(state, shapes)
    images = [pictures(n, n) for n in (32, 256, 299, 512)]
    ours = jit(lambda p, x: inception.InceptionV3().apply({"params": p}, x))(
        params, jnp.concatenate([inception.resize(image) for image in images])
    )
    resized = [torch_inception.resize(image) for image in images]
    theirs = torch_inception.Network(state)(np.concatenate(resized))
    for our, their, width in zip(ours, theirs, (2048, 1008), strict=True):
        assert our.shape == (4, width)
        assert np.std(their, axis=0).mean() > 0.1 * np.abs(their).mean()  # pictures differ
        for a, b in zip(our, their, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


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
