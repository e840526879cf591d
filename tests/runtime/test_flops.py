"""FLOP counts: closed forms, transformations, and the paper's number for XL/2."""

import jax
import jax.numpy as jnp
import pytest

from condiff_jax.conditioning.cond import Cond
from condiff_jax.models.mmdit import MMDiT
from condiff_jax.models.transformer import SIZES
from condiff_jax.runtime import flops

X, W = jnp.zeros((3, 4)), jnp.zeros((4, 5))
XW = 2 * 3 * 4 * 5


def square(x, w):
    return ((x @ w) ** 2).sum()


@pytest.mark.parametrize(
    "spec, shapes, expected",
    [
        ("ij,jk->ik", [(3, 4), (4, 5)], XW),
        ("bqhd,bkhd->bhqk", [(2, 5, 3, 8), (2, 7, 3, 8)], 2 * 2 * 3 * 5 * 7 * 8),
        ("abc,bcd->ad", [(2, 3, 4), (3, 4, 5)], 2 * 2 * 3 * 4 * 5),
        ("i,j->ij", [(3,), (4,)], 2 * 3 * 4),
    ],
)
def test_matrix_products(spec, shapes, expected):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert flops.count(lambda a, b: jnp.einsum(spec, a, b), *args) == expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", [("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")])
def test_convolutions(layout, groups):
    sizes = {"N": 2, "H": 8, "W": 6, "C": 4}
    kernel = {"H": 3, "W": 3, "I": 4 // groups, "O": 10}
    x = jnp.zeros([sizes[axis] for axis in layout[0]])
    w = jnp.zeros([kernel[axis] for axis in layout[1]])

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=groups
        )

    assert flops.count(conv, x, w) == 2 * (2 * 4 * 3 * 10) * (3 * 3 * 4 // groups)


def test_other_operations_count_nothing():
    assert flops.count(lambda x: jnp.tanh(x).sum() + x.T.mean(), X) == 0


def test_scan_counts_its_length():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    ws = jnp.zeros((7, 4, 4))
    assert flops.count(layers, X, ws) == 7 * 2 * 3 * 4 * 4

    def nested(x, ws):
        return jax.lax.scan(lambda x, _: (layers(x, ws), None), x, length=5)[0]

    assert flops.count(nested, X, ws) == 5 * 7 * 2 * 3 * 4 * 4


def test_scan_unrolled_in_part():
    def layers(x, ws):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, ws, unroll=2)[0]

    assert flops.count(layers, X, jnp.zeros((6, 4, 4))) == 6 * 2 * 3 * 4 * 4


@jax.custom_vjp
def custom(x, w):
    return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@pytest.mark.parametrize(
    "function",
    [jax.jit(square), jax.checkpoint(square), custom, jax.jit(jax.checkpoint(jax.jit(square)))],
)
def test_inside_other_calls(function):
    assert flops.count(function, X, W) == XW
    assert flops.count(lambda x, w: (function(x, w) + x @ w).sum(), X, W) == 2 * XW


def test_both_branches_of_a_conditional_count():
    choose = lambda p, x, w: jax.lax.cond(p, lambda: x @ w, lambda: jnp.zeros((3, 5)))  # noqa: E731
    assert flops.count(choose, True, X, W) == XW


def test_gradients():
    both = jax.value_and_grad(square, (0, 1))
    assert flops.count(both, X, W) == 3 * XW  # forward, and one product for each argument
    assert flops.count(jax.grad(square, 1), X, W) == 2 * XW
    rematerialized = jax.value_and_grad(jax.checkpoint(square), (0, 1))
    assert flops.count(rematerialized, X, W) == 4 * XW  # the forward product twice
    through_custom = jax.value_and_grad(lambda x, w: custom(x, w).sum(), (0, 1))
    assert flops.count(through_custom, X, W) == 3 * XW


def test_gradient_of_a_scan():
    def loss(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0].sum()

    ws = jnp.zeros((7, 4, 4))
    assert flops.count(jax.value_and_grad(loss, (0, 1)), X, ws) == 3 * 7 * 2 * 3 * 4 * 4


def test_nothing_is_executed():
    huge = jax.ShapeDtypeStruct((10**6, 10**6), jnp.float32)
    assert flops.count(jnp.matmul, huge, huge) == 2 * 10**18


@pytest.mark.parametrize("remat, unroll", [("none", 1), ("block", 4)])
def test_xl_2_has_the_paper_s_forward_gflop(remat, unroll):
    depth, width, heads = SIZES["XL"]
    model = MMDiT(
        depth, width, heads, patch=2, base_grid=16, streams="shared", classes=1000,
        remat=remat, unroll=unroll,
    )  # fmt: skip
    cond = Cond.of(jnp.zeros((1,), jnp.int32))
    args = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,), jnp.int32), cond
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    assert flops.count(model.apply, variables, *args) / 1e9 == pytest.approx(237.4, rel=0.015)


@pytest.mark.parametrize("kind, expected", [("NVIDIA H100 80GB HBM3", 989), ("abacus", None)])
def test_peak_of_this_machine(monkeypatch, kind, expected):
    class Device:
        device_kind = kind

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    assert flops.peak_tflops() == expected
