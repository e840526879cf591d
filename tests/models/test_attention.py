"""Attention: parity with PyTorch, and backends that agree, as far as they run without their device.

cuDNN's needs a GPU: here only whether a call reaches it is looked at.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from condiff_jax import sharding
from condiff_jax.models import attention as lib
from condiff_jax.models.attention import attention


def inputs(queries, keys=None, batch=1, heads=2, size=8, dtype=jnp.float32):
    shapes = [(batch, n, heads, size) for n in (queries, keys or queries, keys or queries)]
    return [jax.random.normal(jax.random.key(i), s, dtype) for i, s in enumerate(shapes)]


@pytest.mark.parametrize("biased", [False, True])
def test_attention_agrees_with_torch(biased):
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, 7, 3, 8)).astype(np.float32)
    bias = rng.normal(size=(2, 3, 7, 7)).astype(np.float32) if biased else None
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.from_numpy(a).transpose(1, 2) for a in (q, k, v)),
        attn_mask=torch.from_numpy(bias) if biased else None,
    )
    ours = attention(*map(jnp.asarray, (q, k, v)), bias=bias)
    np.testing.assert_allclose(ours, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_attention_has_an_f32_softmax():
    # Logits around 30 that bf16 would round by up to 0.06, and weights with them by 6%.
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 16)) for i in range(3))
    half = [a.astype(jnp.bfloat16) for a in (6 * q, 6 * k, v)]
    out = attention(*half)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(a.astype(jnp.float32) for a in half))
    assert np.sqrt(np.mean((out.astype(jnp.float32) - exact) ** 2)) < 0.005


@pytest.fixture
def flash(monkeypatch):
    """The TPU's kernel, interpreted, for few keys as well; the calls that reach it."""
    kernel, calls = lib.pallas.flash_attention, []
    monkeypatch.setattr(lib, "LONG", 100)
    monkeypatch.setattr(
        lib.pallas, "flash_attention", lambda *a, **k: calls.append(a[0].shape) or kernel(*a, **k)
    )
    with pltpu.force_tpu_interpret_mode():
        yield calls


def test_flash_attention_is_attention(flash):
    """With lengths that are not whole tiles, forward and backward."""
    given = inputs(130, 200)
    weights = jax.random.normal(jax.random.key(7), given[0].shape)

    def both(backend):
        def loss(q, k, v):
            out = attention(q, k, v, backend)
            return (out * weights).sum(), out

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*given)

    (_, out), grads = both("flash")
    assert flash == [(1, 2, 256, 8)]
    (_, expected), expected_grads = both("xla")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_flash_attention_on_a_mesh_runs_where_its_examples_are(flash):
    mesh = sharding.create_mesh(2)
    given = inputs(128, batch=8)
    placed = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in given]
    run = jax.jit(sharding.traced_on(mesh, lambda *a: attention(*a, "flash")))
    out = run(*placed)
    assert flash == [(1, 2, 128, 8)]  # of eight examples on eight devices
    assert out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    np.testing.assert_allclose(out, attention(*given), atol=1e-5)


def test_what_a_backend_cannot_do_xla_does(flash, monkeypatch):
    called = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, **__: called.append(q.shape[-1]) or q
    )
    few = inputs(8)
    bias = jnp.ones((1, 2, 8, 8))
    for backend, given, bias_ in (("flash", few, None), ("flash", inputs(128), 1.0)):
        exact = attention(*given, "xla", bias_)
        np.testing.assert_array_equal(attention(*given, backend, bias_), exact)
    assert not flash
    for size in (160, 12):  # too large, not a multiple of 8
        given = inputs(8, size=size)
        np.testing.assert_array_equal(attention(*given, "cudnn"), attention(*given))
    odd = inputs(7, 8)
    np.testing.assert_array_equal(
        attention(*odd, "cudnn", bias[:, :, :7]), attention(*odd, "xla", bias[:, :, :7])
    )
    assert not called
    attention(*few, "cudnn"), attention(*few, "cudnn", bias), attention(*odd, "cudnn")
    assert called == [8, 8, 8]


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cpu", "bfloat16", "xla"),
        ("gpu", "bfloat16", "cudnn"),
        ("cuda", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),  # cuDNN has none
        ("tpu", "bfloat16", "flash"),
        ("tpu", "float32", "flash"),
    ],
)
def test_the_fastest_of_each_platform(platform, dtype, expected):
    assert lib.fastest(platform, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize("tokens", [128, 640, 1024, 1152])
def test_blocks_divide_what_is_padded(tokens):
    blocks = lib._blocks(tokens, tokens)
    assert tokens % blocks.block_q == 0 and blocks.block_q <= 512
    assert blocks.block_q == {128: 128, 640: 128, 1024: 512, 1152: 384}[tokens]
