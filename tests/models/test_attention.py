"""Attention: parity with PyTorch and between backends, as far as they run without their device.

cuDNN attention can be traced without a GPU, and tracing decides which lengths and sizes JAX
supports.
"""

from functools import partial

import jax
import jax._src.cudnn.fused_attention_stablehlo as fused
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from benchmarks.parity import jit
from condiff_jax.models import attention as lib
from condiff_jax.models.attention import attention
from condiff_jax.models.mdt import hide
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.runtime import sharding
from configs import table1


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
    out = attention(*map(jnp.asarray, (q, k, v)), bias=bias)
    np.testing.assert_allclose(out, expected.transpose(1, 2).numpy(), atol=1e-5)


def test_attention_has_an_f32_softmax():
    # bf16 would round logits around 30 by up to 0.06, which changes attention weights by 6%.
    q, k, v = (jax.random.normal(jax.random.key(i), (1, 64, 2, 16)) for i in range(3))
    half = [a.astype(jnp.bfloat16) for a in (6 * q, 6 * k, v)]
    out = attention(*half)
    assert out.dtype == jnp.bfloat16
    exact = attention(*(a.astype(jnp.float32) for a in half))
    assert np.sqrt(np.mean((out.astype(jnp.float32) - exact) ** 2)) < 0.005


@pytest.fixture
def flash(monkeypatch):
    """Interpret the TPU kernel, also for few keys; yields the shapes of its calls."""
    kernel, calls = lib.pallas.flash_attention, []
    monkeypatch.setattr(lib, "FLASH_MIN_KEYS", 100)
    monkeypatch.setattr(
        lib.pallas, "flash_attention", lambda *a, **k: calls.append(a[0].shape) or kernel(*a, **k)
    )
    with pltpu.force_tpu_interpret_mode():
        yield calls


def test_flash_attention_is_attention(flash):
    """Forward and backward agree with xla at lengths that are not whole tiles."""
    qkv = inputs(30, 110)
    weights = jax.random.normal(jax.random.key(7), qkv[0].shape)

    def both(backend):
        def loss(q, k, v):
            out = attention(q, k, v, backend)
            return (out * weights).sum(), out

        return jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*qkv)

    (_, out), grads = both("flash")
    assert flash == [(1, 2, 128, 8)]
    (_, expected), expected_grads = both("xla")
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_flash_attention_on_a_mesh_runs_on_the_devices_of_its_examples(flash):
    mesh = sharding.create_mesh(2)
    qkv = inputs(128, batch=8)
    sharded = [jax.device_put(a, sharding.batch_sharding(mesh)) for a in qkv]
    run = jax.jit(sharding.traced_on(mesh, lambda *a: attention(*a, "flash")))
    out = run(*sharded)
    assert flash == [(1, 2, 128, 8)]  # eight examples on eight devices
    assert out.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
    np.testing.assert_allclose(out, attention(*qkv), atol=1e-5)


@pytest.fixture
def gpu(monkeypatch):
    """Let JAX trace its cuDNN attention on a machine without cuDNN."""
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)


def cudnn_calls(function, *inputs):
    """Count the cuDNN attention calls of a traced function, (forward, backward)."""
    text = str(jax.make_jaxpr(function)(*inputs))
    return tuple(text.count(f"dot_product_attention_{way}_wrapper[") for way in ("fwd", "bwd"))


def test_xla_replaces_a_backend_that_does_not_support_the_inputs(flash, gpu):
    for qkv, bias in ((inputs(8), None), (inputs(128), 1.0)):  # too few keys; a bias
        exact = attention(*qkv, "xla", bias)
        np.testing.assert_array_equal(attention(*qkv, "flash", bias), exact)
    assert not flash
    for size in (160, 12):  # too large, not a multiple of 8
        qkv = inputs(8, size=size)
        np.testing.assert_array_equal(attention(*qkv, "cudnn"), attention(*qkv))
    qkv = inputs(8, dtype=jnp.bfloat16)
    assert cudnn_calls(lambda *a: attention(*a, "cudnn"), *qkv) == (1, 0)


def has_gradient(q, k, v, bias):
    """Whether cuDNN attention can be traced forward and backward for these inputs."""

    def loss(q, k, v, bias):
        return attention(q, k, v, "cudnn", bias).astype(jnp.float32).sum()

    argnums = (0, 1, 2) if bias is None else (0, 1, 2, 3)
    return cudnn_calls(jax.grad(loss, argnums), q, k, v, bias) == (1, 1)


LENGTHS = [(8, 8), (7, 7), (7, 8), (8, 7), (8, 1), (1, 8)]


@pytest.mark.parametrize("queries, keys", LENGTHS)
@pytest.mark.parametrize("biased", [False, True])
def test_cudnn_attention_has_a_gradient_at_any_length(gpu, queries, keys, biased):
    bias = jnp.ones((1, 2, queries, keys)) if biased else None
    assert has_gradient(*inputs(queries, keys, dtype=jnp.bfloat16), bias)


@pytest.mark.parametrize("queries, keys", LENGTHS)
@pytest.mark.parametrize("biased", [False, True])
def test_the_inputs_of_cudnn_compute_attention(monkeypatch, queries, keys, biased):
    """JAX's XLA implementation of the same call agrees with ours, forward and backward."""
    qkv = inputs(queries, keys, batch=2)
    bias = jax.random.normal(jax.random.key(8), (2, 2, queries, keys)) if biased else None
    weights = jax.random.normal(jax.random.key(7), qkv[0].shape)

    @partial(jit, static_argnums=0)
    def both(backend, *arrays):
        def loss(q, k, v, bias):
            out = attention(q, k, v, backend, bias)
            return (out * weights).sum(), out

        argnums = (0, 1, 2, 3) if biased else (0, 1, 2)
        (_, out), grads = jax.value_and_grad(loss, argnums, has_aux=True)(*arrays)
        return [out, *grads]

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn,
        "dot_product_attention",
        lambda *a, implementation, **k: original(*a, implementation="xla", **k),
    )
    for actual, expected in zip(
        *(both(name, *qkv, bias) for name in ("cudnn", "xla")), strict=True
    ):
        np.testing.assert_allclose(actual, expected, atol=1e-5)


# UNets at 512 pixels are left out: their lengths are even, or those of the text at 256 pixels.
ROWS = [row for row in table1.ROWS if row.partition(",")[0] != "arch=unet" or row.endswith("256")]


@pytest.fixture(scope="module")
def checked():
    """Attention inputs for which `has_gradient` was checked."""
    return set()


def create(row):
    """Create the objective of a row of Table 1 with cuDNN attention."""
    values = table1.get_config(row)
    values.model.attention, values.init.pretrain = "cudnn", None
    values.autoencoder.path = values.text_encoder.path = "not read"
    classes = tuple(map(str, range(values.data.classes)))
    return diffusion.create(create_config(values), Vocabulary((), classes))


@pytest.mark.parametrize("row", ROWS)
def test_every_model_of_the_paper_trains_with_cudnn_attention(gpu, monkeypatch, checked, row):
    """Trace the forward pass of each row, and the gradient of each attention call in it.

    Rows and layers share attention shapes, so that each shape is checked once.
    """
    objective = create(row)
    original, calls = lib.cudnn, set()

    def cudnn(*arrays):
        calls.add(tuple(a if a is None else (a.shape, a.dtype) for a in arrays))
        return original(*arrays)

    monkeypatch.setattr(lib, "cudnn", cudnn)
    assert objective.shapes and calls  # computing the shapes traces the forward pass
    lengths = {queries[1] for (queries, _), *_ in calls}
    if objective.config.model.name == "mdtv2":
        assert len(lengths) == 2  # visible tokens, and all tokens
    for call in calls - checked:
        assert has_gradient(*(a and jax.ShapeDtypeStruct(*a) for a in call))
    checked |= calls


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_the_gradient_of_every_model_of_the_paper_is_traced(gpu, row):
    """Trace the gradient of the whole model, for MDT also with hidden tokens."""
    objective = create(row)
    x = jax.ShapeDtypeStruct((1, *objective.latent_shape), jnp.float32)
    t, cond = jax.ShapeDtypeStruct((1,), jnp.int32), jax.eval_shape(objective.example_cond)
    modes = [{}]
    if objective.config.model.name == "mdtv2":
        tokens = (x.shape[1] // objective.model.patch) ** 2
        modes += [{"hidden": hide(jax.random.key(0), 1, tokens, objective.model.mask_ratio)}]

    def loss(mode, params, x, t, cond):
        return objective.denoise(params, **mode)(x, t, cond).sum()

    for mode in modes:
        gradient = jax.grad(partial(loss, mode))
        forward, backward = cudnn_calls(gradient, objective.shapes, x, t, cond)
        assert forward >= backward >= 1


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cpu", "bfloat16", "xla"),
        ("gpu", "bfloat16", "cudnn"),
        ("cuda", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),  # cuDNN has no f32 attention
        ("tpu", "bfloat16", "flash"),
        ("tpu", "float32", "flash"),
    ],
)
def test_the_fastest_of_each_platform(platform, dtype, expected):
    assert lib.fastest(platform, jnp.dtype(dtype)) == expected


@pytest.mark.parametrize("tokens", [128, 640, 1024, 1152])
def test_blocks_divide_padded_lengths(tokens):
    blocks = lib._blocks(tokens, tokens)
    assert tokens % blocks.block_q == 0 and blocks.block_q <= 512
    assert blocks.block_q == {128: 128, 640: 128, 1024: 512, 1152: 384}[tokens]
