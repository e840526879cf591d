"""UNet: parity with diffusers' UNet2DConditionModel, path of each condition, published sizes."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import parity
from condiff_jax.conditioning.cond import Cond, Control, Text
from condiff_jax.conditioning.control import Weighting
from condiff_jax.models.unet import SIZES, Size, UNet
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.runtime import flops

CHANNELS, TOKENS, CONTEXT, CLASSES = 3, 5, 12, 5
T = np.array([3, 700], np.int32)
SMALL = Size((8,), (True,), CONTEXT, heads=2, resnets=1)
MINIMAL = Size((8,), (False,), CONTEXT, heads=2, resnets=1)  # attention in the middle only


def rng(seed=0):
    return np.random.default_rng(seed)


def text(seed=0, batch=2):
    tokens = rng(seed).normal(size=(batch, TOKENS, CONTEXT)).astype(np.float32)
    return Text(jnp.asarray(tokens), jnp.ones((batch, TOKENS), bool), jnp.zeros((batch, CONTEXT)))


def control(high=0.0, low=0.0):
    return Control(jnp.full((2, 3), 100 + high), jnp.full((2, 2), 32 + low))


def semantics(classes, seed=0):
    """Two texts or two labels, which differ between seeds 0 and 1."""
    return text(seed) if classes is None else jnp.array([seed, 2 + seed])


def condition(classes=None, seed=0, controlled=True):
    return Cond.of(semantics(classes, seed), control() if controlled else None)


def noise(height=4, width=8, seed=5):
    return rng(seed).normal(size=(2, height, width, CHANNELS)).astype(np.float32)


def random_like(shapes, seed=0):
    """Random parameters, nonzero also where the initialization is zero."""
    generator = rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        size = 0.2
        if path[-1].key == "kernel":
            merge = leaf.ndim == 3 and path[-3].key == "out"
            fan_in = leaf.size // leaf.shape[-1] if leaf.ndim != 3 or merge else leaf.shape[0]
            size = fan_in**-0.5
        return jnp.asarray(center + size * generator.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@partial(parity.jit, static_argnums=0)
def forward(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond)


@partial(parity.jit, static_argnums=0)
def gradients(model, params, x, cond, target):
    """Return the prediction, and the gradient of its mean squared error."""

    def loss(params):
        eps = model.apply({"params": params}, x, T, cond)
        return ((eps - target) ** 2).mean(), eps

    grads, eps = jax.grad(loss, has_aux=True)(params)
    return eps, grads


@cache
def build(classes=None, controlled=True, size=SMALL, **settings):
    """Return (model, random parameters) for text or classes, with or without control."""
    model = UNet(size, classes, Weighting("cosine"), **settings)
    cond = condition(classes, controlled=controlled)
    shapes = jax.eval_shape(model.init, jax.random.key(0), noise(), T, cond)["params"]
    return model, random_like(shapes)


def scaled(params, pattern, factor):
    """Return the parameters with those of matching modules times `factor`."""
    flat = flatten_dict(params, sep="/")
    matches = [name for name in flat if pattern in name]
    assert matches
    return unflatten_dict(flat | {name: factor * flat[name] for name in matches}, sep="/")


# ---------------------------------------------------------------------------------------------
# Parity with diffusers at small features; test_parity has the usual ones.

# Modules whose outputs are inputs of norms.
BEFORE_NORMS = (
    "conv_in", "conv1", "/time/", "conv2", "shortcut", "sample", "proj_", "out/linear", "mlp/fc2",
)  # fmt: skip


def test_norm_epsilons_agree_with_diffusers_at_small_features():
    size = Size((8, 16), (True, False), CONTEXT, heads=2, resnets=1)
    model, params = build(controlled=False, size=size, qk_norm=False)
    for pattern in BEFORE_NORMS:
        params = scaled(params, pattern, 0.05)
    x, cond = noise(8, 8), condition(controlled=False)
    reference = parity.diffusers_unet(8, model.size)
    parity.load(reference, key_maps.to_published(to_torch(params), key_maps.UNET))
    args = torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(T).long(), cond
    expected = parity.call_unet(reference, *args).permute(0, 2, 3, 1).detach().numpy()
    error = np.abs(forward(model, params, x, T, cond) - expected).max()
    assert error < 1e-5 * np.abs(expected).max()


# ---------------------------------------------------------------------------------------------
# Initialization


def test_output_is_zero_at_initialization():
    model = UNet(MINIMAL, CLASSES, Weighting())
    out, variables = parity.jit(model.init_with_output)(
        jax.random.key(0), noise(), T, condition(CLASSES)
    )
    np.testing.assert_array_equal(out, np.zeros((2, 4, 8, CHANNELS)))
    for name, value in flatten_dict(variables["params"], sep="/").items():
        # The last layer of each residual branch and the last convolution are zero.
        zero = any(part in name for part in ("bias", "conv2", "proj_out", "conv_out"))
        zero = zero or (name.startswith("control/") and "fc2" in name)
        assert (np.abs(value).max() == 0) == zero, name


# ---------------------------------------------------------------------------------------------
# Effect of each condition, measured for each sample with random weights.


def influence(model, params, cond1, cond2, t=T):
    """Largest change of each sample's output (B,) between two conditions."""
    a, b = (np.asarray(forward(model, params, noise(), t, cond)) for cond in (cond1, cond2))
    return np.abs(a - b).max((1, 2, 3))


def has_effect(change):
    return change > 1e-3


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_dropped_semantics_are_the_null_condition(classes):
    drop = jnp.array([True, False])
    cond1, cond2 = (condition(classes, seed).replace(drop_semantics=drop) for seed in (0, 1))
    model, params = build(classes)
    assert has_effect(influence(model, params, cond1, cond2)).tolist() == [False, True]
    null = (
        jax.tree.map(jnp.zeros_like, cond1.semantics) if classes is None else jnp.full(2, CLASSES)
    )
    explicit = Cond.of(null, control())
    np.testing.assert_allclose(influence(model, params, cond1, explicit)[0], 0, atol=1e-5)
    assert has_effect(influence(model, params, cond1, explicit))[1]


@pytest.mark.parametrize("classes", [None, CLASSES])
def test_semantics_enter_through_cross_attention_only(classes):
    cond1, cond2 = (condition(classes, seed) for seed in (0, 1))
    model, params = build(classes)
    assert has_effect(influence(model, params, cond1, cond2)).all()
    ablated = scaled(params, "cross_attention/out/", 0)
    assert not has_effect(influence(model, ablated, cond1, cond2)).any()


def test_control_enters_through_the_time_embedding_only():
    base, high, low = (Cond.of(text(), c) for c in (control(), control(high=7.0), control(low=7.0)))
    model, params = build()
    t = jnp.array([0, 995])  # where low-level control is on, and where it has faded out
    ablated = scaled(params, "time/kernel", 0)
    for changed, expected in ((high, [True, True]), (low, [True, False])):
        assert has_effect(influence(model, params, base, changed, t)).tolist() == expected
        assert not has_effect(influence(model, ablated, base, changed, t)).any()
        drop = jnp.array([True, False])
        dropped = (c.replace(drop_control=drop) for c in (base, changed))
        expected = [False, expected[1]]
        assert has_effect(influence(model, params, *dropped, t)).tolist() == expected


def test_dropped_control_equals_a_model_without_control():
    model, params = build()
    dropped = condition().drop(semantics=False, control=True)
    _, without = build(controlled=False)
    assert set(params) - set(without) == {"control"}
    without = {name: value for name, value in params.items() if name != "control"}
    a = forward(model, params, noise(), T, dropped)
    b = forward(model, without, noise(), T, condition(controlled=False))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_qk_norm_applies_to_cross_attention():
    cond = condition()
    model, params = build()
    _, plain = build(qk_norm=False)
    added = set(flatten_dict(params, sep="/")) - set(flatten_dict(plain, sep="/"))
    assert {name.split("/", 1)[1] for name in added} == {
        "cross_attention/query_norm/scale",
        "cross_attention/key_norm/scale",
    }
    out = forward(model, params, noise(), T, cond)
    for name in ("query", "key"):
        scaled_params = scaled(params, f"cross_attention/{name}/", 3)
        np.testing.assert_allclose(forward(model, scaled_params, noise(), T, cond), out, atol=1e-3)
        scaled_params = scaled(params, f"self_attention/{name}/", 3)
        assert np.abs(forward(model, scaled_params, noise(), T, cond) - out).max() > 1e-2
        scaled_params = scaled(params, f"cross_attention/{name}_norm/", 3)
        assert np.abs(forward(model, scaled_params, noise(), T, cond) - out).max() > 1e-2


# ---------------------------------------------------------------------------------------------
# Settings that do not change the result


def test_remat_recomputes_blocks_with_the_same_result():
    results, counts = [], []
    plain, params = build(size=MINIMAL)
    for model in (plain, plain.clone(remat="block")):
        args = params, noise(), condition(), noise(seed=6)
        results.append(jax.tree.leaves(gradients(model, *args)))
        counts.append(flops.count(partial(gradients.__wrapped__, model), *args))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))
    # The backward pass is twice the work of the forward pass, which remat repeats, except for the
    # last product of each block, whose result no backward pass needs.
    assert 1.15 < counts[1] / counts[0] < 1.33
    with pytest.raises(KeyError, match="dots"):
        build(size=MINIMAL, remat="dots")


def test_bf16_is_close_to_f32():
    f32, params = build()
    bf16, bf16_params = build(dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, bf16_params) == jax.tree.map(lambda a: a.dtype, params)
    a, b = (forward(m, params, noise(), T, condition()) for m in (f32, bf16))
    assert a.dtype == b.dtype == jnp.float32
    error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
    assert 1e-4 < error < 0.03  # bf16 rounds each operation by up to 0.4%


# ---------------------------------------------------------------------------------------------
# Published sizes, and Table A1


def published_size(name, semantics, classes=None):
    """Return (model without control, shapes of its variables, arguments for one 32 x 32 latent)."""
    model = UNet(SIZES[name], classes, qk_norm=False)
    args = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,), jnp.int32), Cond.of(semantics)
    return model, jax.eval_shape(model.init, jax.random.key(0), *args), args


def parameters(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_class_model_has_the_size_of_ldm_4():
    _, variables, _ = published_size("class", jnp.zeros((1,), jnp.int32), classes=1000)
    assert parameters(variables) - 1001 * 512 == pytest.approx(400.92e6, rel=1e-4)


def test_text_model_has_the_size_of_stable_diffusion():
    text = Text(jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool), jnp.zeros((1, 768)))
    model, variables, args = published_size("text", text)
    assert parameters(variables) == pytest.approx(859.52e6, rel=1e-4)
    # The 189.78 GFLOP of Table A1 include control and unspecified operations.
    assert flops.count(model.apply, variables, *args) == pytest.approx(189.78e9, rel=0.06)
