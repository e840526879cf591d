"""Two class-conditioning methods by hand; test_unet2d.py tests all methods."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.conditioning.control import Weighting
from condiff_jax.models import conditioners

RNG = np.random.default_rng(0)
H = RNG.normal(3.0, 2.0, (2, 3, 3, 8)).astype(np.float32)  # neither centered nor of unit variance
CLASS = RNG.normal(size=(2, 16)).astype(np.float32)
T = jnp.array([250, 750])
WEIGHTING = Weighting("linear")  # 0.75 and 0.25 at T


def apply(name, *path, kernel=None, bias=None):
    """Apply a method with its initial parameters, except for one layer, to H."""
    module = conditioners.load(name)[1](weighting=WEIGHTING)
    params = module.init(jax.random.key(0), H, CLASS, CLASS, T)["params"]
    layer = params
    for part in path:
        layer = layer[part]
    layer["kernel"] = layer["kernel"] if kernel is None else jnp.asarray(kernel, jnp.float32)
    layer["bias"] = layer["bias"] if bias is None else jnp.asarray(bias, jnp.float32)
    return np.asarray(module.apply({"params": params}, H, CLASS, CLASS, T))


def test_adanorm_by_hand():
    kernel, bias = RNG.normal(size=(16, 24)), RNG.normal(size=24)
    modulation = np.asarray(nn.silu(CLASS)) @ kernel + bias
    scale, shift, gate = np.split(modulation[:, None, None], 3, axis=-1)
    normalized = (H - H.mean(-1, keepdims=True)) / H.std(-1, keepdims=True)
    expected = H + gate * (normalized * (1 + scale) + shift)
    out = apply("adanorm", "modulation", kernel=kernel, bias=bias)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_weighted_attn_weights_the_details_alone_with_gamma():
    """The output layer returns its bias: 2 for the coarse half and 10 for the details."""
    out = apply("weighted_attn", "out", bias=[2] * 8 + [10] * 8)
    gamma = np.array([0.75, 0.25]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(out, H + 2 + 10 * gamma, rtol=1e-5)
