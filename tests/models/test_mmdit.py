"""mmDiT: tied streams, the path of each condition, published sizes; parity is in test_parity."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.parity import jit, random_like
from condiff_jax.conditioning.cond import Cond, Control, Text
from condiff_jax.conditioning.control import Weighting
from condiff_jax.models.mmdit import Block, MMDiT, TwoStreamBlock
from condiff_jax.models.transformer import SIZES
from condiff_jax.runtime import flops

DEPTH, WIDTH, HEADS, CHANNELS, CLASSES = 3, 32, 2, 4, 5
TOKENS, TEXT, POOLED = 5, 12, 10
T = np.array([3, 700], np.int32)


def rng(seed=0):
    return np.random.default_rng(seed)


def text(seed=0, batch=2):
    tokens = rng(seed).normal(size=(batch, TOKENS, TEXT)).astype(np.float32)
    pooled = rng(seed + 100).normal(size=(batch, POOLED)).astype(np.float32)
    return Text(jnp.asarray(tokens), jnp.ones((batch, TOKENS), bool), jnp.asarray(pooled))


def control(high=0.0, low=0.0):
    return Control(jnp.full((2, 3), 100 + high), jnp.full((2, 2), 32 + low))


def semantics(classes, seed=0):
    """Two texts or two labels, which differ between seeds 0 and 1."""
    return text(seed) if classes is None else jnp.array([seed, 2 + seed])


def noise(side=4, seed=5):
    return rng(seed).normal(size=(2, side, side, CHANNELS)).astype(np.float32)


@partial(jit, static_argnums=0)
def forward(model, params, x, t, cond):
    return model.apply({"params": params}, x, t, cond)


def build(cond, **settings):
    """Return (model, random parameters)."""
    model, params = abstract(cond, **settings)
    return model, random_like(params)


def abstract(cond, **settings):
    """Return (model, shapes of its parameters)."""
    leaves, tree = jax.tree.flatten(cond)
    defaults = {"streams": "qkv", "weighting": Weighting("cosine"), "base_grid": 2}
    model = MMDiT(width=WIDTH, heads=HEADS, patch=2, **({"depth": DEPTH} | defaults | settings))
    return model, traced(model, tree, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in leaves))


@cache
def traced(model, tree, *leaves):
    cond = jax.tree.unflatten(tree, leaves)
    return jax.eval_shape(model.init, jax.random.key(0), noise(), T, cond)["params"]


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


# ---------------------------------------------------------------------------------------------
# `shared` and `qkv` streams equal full streams with tied weights.


def untie(block):
    """Parameters of a TwoStreamBlock that is equivalent to a Block with these parameters."""
    out = {"modulation": block["modulation"], "context_modulation": block["modulation"]}
    for name in ("query", "key", "value", "query_norm", "key_norm", "out", "mlp"):
        own = block.get("context_" + name, block[name])
        if name in ("query", "key", "value") and own is not block[name]:
            # These projections have no bias in a Block.
            bias = jnp.zeros_like(block[name]["linear"]["bias"])
            own = {"linear": {**own["linear"], "bias": bias}}
        out |= {name: block[name], "context_" + name: own}
    return out


@pytest.mark.parametrize("streams", ["shared", "qkv"])
def test_blocks_are_tied_two_stream_blocks(streams):
    x = jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
    c = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    z, emb = jnp.concatenate([x, c], 1), jax.random.normal(jax.random.key(2), (2, WIDTH))
    block = Block(HEADS, 4, streams, True, "xla", jnp.float32)
    params = random_like(jax.eval_shape(block.init, jax.random.key(3), z, emb)["params"])
    out, _ = jit(block.apply)({"params": params}, z, emb)
    full = TwoStreamBlock(HEADS, True, "xla", jnp.float32)
    expected, _ = jit(full.apply)({"params": untie(params)}, (x, c), emb)
    assert relative(out, np.concatenate(expected, 1)) < 1e-5
    assert relative(out, np.asarray(z)) > 0.1


@pytest.mark.parametrize("streams", ["shared", "qkv"])
def test_models_are_tied_two_stream_models(streams):
    cond = Cond.of(semantics(CLASSES), control())
    model, params = build(cond, streams=streams, classes=CLASSES, pooled=True)
    blocks = untie(params["blocks"])
    last = jax.tree.map(lambda a: a[-1], blocks)
    del last["context_out"], last["context_mlp"]
    modulation = last["context_modulation"]["linear"]  # only shift and scale are needed
    last["context_modulation"] = {"linear": jax.tree.map(lambda a: a[..., : 2 * WIDTH], modulation)}
    untied = params | {"blocks": jax.tree.map(lambda a: a[:-1], blocks), "last_block": last}
    full, shapes = abstract(cond, streams="full", classes=CLASSES, pooled=True)
    assert jax.tree.map(jnp.shape, untied) == jax.tree.map(jnp.shape, shapes)
    a, b = forward(model, params, noise(), T, cond), forward(full, untied, noise(), T, cond)
    assert relative(a, np.asarray(b)) < 1e-4


# ---------------------------------------------------------------------------------------------
# AdaLN-zero

VARIANTS = [(s, c) for s in ("shared", "qkv", "full") for c in (None, CLASSES)]


# The fast suite tests the initialization of qkv blocks below.
QKV = pytest.param("qkv", None, marks=pytest.mark.slow)


@pytest.mark.parametrize("streams, classes", [("shared", CLASSES), QKV, ("full", None)])
def test_output_is_zero_at_initialization(streams, classes):
    cond = Cond.of(semantics(classes), control())
    model = MMDiT(
        2, WIDTH, HEADS, patch=2, base_grid=2, streams=streams, classes=classes, pooled=False,
        weighting=Weighting(),
    )  # fmt: skip
    out, variables = jit(model.init_with_output)(jax.random.key(0), noise(), T, cond)
    np.testing.assert_array_equal(out, np.zeros((2, 4, 4, CHANNELS)))
    params = flatten_dict(variables["params"], sep="/")
    for name, value in params.items():
        zero = name.endswith("bias") or "odulation" in name or name.startswith("final/")
        zero = zero or (name.startswith("control/") and "fc2" in name)
        assert (np.abs(value).max() == 0) == zero, name


@pytest.mark.parametrize("streams", ["shared", "qkv"])
def test_blocks_are_the_identity_at_initialization(streams):
    z = jax.random.normal(jax.random.key(0), (2, 9, WIDTH))
    emb = jax.random.normal(jax.random.key(1), (2, WIDTH))
    block = Block(HEADS, 4, streams, True, "xla", jnp.float32)
    (out, _), _ = jit(block.init_with_output)(jax.random.key(0), z, emb)
    np.testing.assert_array_equal(out, z)


@pytest.mark.parametrize("last", [False, True])
def test_two_stream_blocks_are_the_identity_at_initialization(last):
    x = jax.random.normal(jax.random.key(0), (2, 4, WIDTH))
    c = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
    block = TwoStreamBlock(HEADS, True, "xla", jnp.float32, last)
    (out, _), _ = jit(block.init_with_output)(jax.random.key(0), (x, c), jnp.ones((2, WIDTH)))
    np.testing.assert_array_equal(out[0], x)
    np.testing.assert_array_equal(out[1], c)


# ---------------------------------------------------------------------------------------------
# Effect of each condition, measured for each sample with random weights.


def influence(model, params, cond1, cond2, t=T):
    """Largest change of each sample's output (B,) between two conditions."""
    a, b = (np.asarray(forward(model, params, noise(), t, cond)) for cond in (cond1, cond2))
    return np.abs(a - b).max((1, 2, 3))


def has_effect(change):
    return change > 1e-3


def zeroed(params, pattern):
    """Return the parameters with those of matching modules set to zero."""
    flat = flatten_dict(params, sep="/")
    matches = [name for name in flat if pattern in name]
    assert matches
    return unflatten_dict(flat | {name: 0 * flat[name] for name in matches}, sep="/")


@pytest.mark.parametrize("streams, classes", VARIANTS)
def test_dropped_semantics_are_the_null_condition(streams, classes):
    drop = jnp.array([True, False])
    cond1, cond2 = (
        Cond.of(semantics(classes, seed), control()).replace(drop_semantics=drop) for seed in (0, 1)
    )
    if classes is None and streams != "full":  # one MLP embeds tokens and pooled text
        cond1, cond2 = (
            c.replace(semantics=c.semantics.replace(pooled=c.semantics.tokens[:, 0]))
            for c in (cond1, cond2)
        )
    model, params = build(cond1, streams=streams, pooled=True, classes=classes)
    assert has_effect(influence(model, params, cond1, cond2)).tolist() == [False, True]
    null = (
        jax.tree.map(jnp.zeros_like, cond1.semantics) if classes is None else jnp.full(2, CLASSES)
    )
    explicit = Cond.of(null, control())
    np.testing.assert_allclose(influence(model, params, cond1, explicit)[0], 0, atol=1e-5)
    assert has_effect(influence(model, params, cond1, explicit))[1]


@pytest.mark.parametrize("streams", ["qkv", "full"])
@pytest.mark.parametrize("pooled", [False, True])
def test_pooled_text_affects_mmdit_only(pooled, streams):
    cond = Cond.of(text().replace(pooled=jnp.zeros((2, TEXT))))
    other_pooled = cond.replace(semantics=cond.semantics.replace(pooled=jnp.ones((2, TEXT))))
    other_tokens = cond.replace(semantics=cond.semantics.replace(tokens=text(1).tokens))
    model, params = build(cond, streams=streams, pooled=pooled)
    assert has_effect(influence(model, params, cond, other_pooled)).tolist() == [pooled] * 2
    assert has_effect(influence(model, params, cond, other_tokens)).all()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("streams, classes", [("qkv", None), ("shared", CLASSES)])
def test_semantics_enter_ours_through_attention_only(streams, classes, pooled):
    cond1, cond2 = (Cond.of(semantics(classes, seed), control()) for seed in (0, 1))
    if classes is None:
        cond1, cond2 = (
            c.replace(semantics=c.semantics.replace(pooled=c.semantics.tokens[:, 0]))
            for c in (cond1, cond2)
        )
    model, params = build(cond1, streams=streams, classes=classes, pooled=pooled)
    ablated = zeroed(params, "blocks/out/")
    assert has_effect(influence(model, ablated, cond1, cond2)).tolist() == [pooled] * 2
    # With the modulation reduced to its biases, the tokens still have an effect by attention.
    ablated = zeroed(params, "linear/kernel")
    flat = flatten_dict(params, sep="/")
    keep = {k: v for k, v in flat.items() if k.endswith("linear/kernel") and "odulation" not in k}
    ablated = unflatten_dict(flatten_dict(ablated, sep="/") | keep, sep="/")
    assert has_effect(influence(model, ablated, cond1, cond2)).all()


def without_modulation(params):
    """Set modulation kernels to zero, so that AdaLN depends on no condition."""
    return {
        name: value * 0 if "odulation" in name and name.endswith("kernel") else value
        for name, value in flatten_dict(params, sep="/").items()
    }


@pytest.mark.parametrize("streams", ["qkv", "full"])
def test_control_enters_through_adaln_only(streams):
    base, high, low = (Cond.of(text(), c) for c in (control(), control(high=7.0), control(low=7.0)))
    model, params = build(base, streams=streams)
    t = jnp.zeros(2, jnp.int32)
    ablated = unflatten_dict(without_modulation(params), sep="/")
    for changed in (high, low):
        assert has_effect(influence(model, params, base, changed, t)).all()
        assert not has_effect(influence(model, ablated, base, changed, t)).any()
        drop = jnp.array([True, False])
        dropped = (c.replace(drop_control=drop) for c in (base, changed))
        assert has_effect(influence(model, params, *dropped, t)).tolist() == [False, True]
    assert has_effect(influence(model, ablated, base, Cond.of(text(1), control()))).all()


def test_low_level_control_fades_out_with_noise():
    base, high, low = (Cond.of(text(), c) for c in (control(), control(high=7.0), control(low=7.0)))
    model, params = build(base)  # cosine, alpha 8
    t = jnp.array([0, 995])
    assert has_effect(influence(model, params, base, low, t)).tolist() == [True, False]
    assert influence(model, params, base, low, t)[1] < 1e-5
    assert has_effect(influence(model, params, base, high, t)).all()
    flat, params = build(base, weighting=Weighting("uniform"))
    assert has_effect(influence(flat, params, base, low, t)).all()


def test_dropped_control_equals_a_model_without_control():
    cond = Cond.of(text(), control())
    model, params = build(cond)
    dropped = cond.drop(semantics=False, control=True)
    without = {name: value for name, value in params.items() if name != "control"}
    a = forward(model, params, noise(), T, dropped)
    b = forward(model, without, noise(), T, Cond.of(text()))
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_streams_differ_in_the_separate_layers_of_condition_tokens():
    cond = Cond.of(text())
    own = {}
    for streams in ("shared", "qkv", "full"):
        _, params = abstract(cond, streams=streams)
        block = nn.meta.unbox(params)["blocks"]
        own[streams] = {name.removeprefix("context_") for name in block if "context" in name}
    assert own["shared"] == set()
    assert own["qkv"] == {"query", "key", "value", "query_norm", "key_norm"}
    assert own["full"] == own["qkv"] | {"modulation", "out", "mlp"}


def test_positions_depend_on_mode_and_base_grid():
    cond = Cond.of(text())
    modes = [(position, base) for position in ("resample", "extrapolate") for base in (2, 5)]
    models = {mode: abstract(cond, position=mode[0], base_grid=mode[1])[0] for mode in modes}
    tables = {mode: model.positions(noise()) for mode, model in models.items()}
    np.testing.assert_array_equal(tables["extrapolate", 2], tables["extrapolate", 5])
    assert np.abs(tables["resample", 2] - tables["resample", 5]).max() > 1e-2
    assert np.abs(tables["resample", 2] - tables["extrapolate", 2]).max() > 1e-2
    # Two tokens a side with base 1 are at 0 and 1 in both modes.
    model, params = build(cond, position="resample", base_grid=1)
    np.testing.assert_allclose(model.positions(noise()), tables["extrapolate", 2], atol=1e-6)
    # The output depends on the table.
    base1 = forward(model, params, noise(), T, cond)
    base2 = forward(models["resample", 2], params, noise(), T, cond)
    assert np.abs(base1 - base2).max() > 1e-3


# ---------------------------------------------------------------------------------------------
# Settings that do not change the result


@pytest.mark.parametrize(
    "settings",
    [
        {"remat": "block", "unroll": 2},
        # The fast suite tests it for dit_att in test_transformers.py, which has the same scan.
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
    ],
)
def test_remat_and_unroll_change_nothing(settings):
    cond = Cond.of(text(), control())
    model, params = build(cond, depth=2)

    def output_and_gradients(model):
        def loss(params):
            eps = model.apply({"params": params}, noise(), T, cond)
            return (jnp.tanh(eps) * noise(seed=6)).sum(), eps

        grads, eps = jit(jax.grad(loss, has_aux=True))(params)
        return [eps, *jax.tree.leaves(grads)]

    results = map(output_and_gradients, (model.clone(**settings), model))
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(b).max()))


def training_flops(**settings):
    cond = Cond.of(text())
    model, params = abstract(cond, **settings)
    loss = lambda params: (model.apply({"params": params}, noise(), T, cond) ** 2).sum()  # noqa: E731
    return flops.count(jax.value_and_grad(loss), params)


@pytest.mark.parametrize("streams", ["shared", "full"])
def test_remat_recomputes_the_documented_activations(streams):
    none, dots, block = (
        training_flops(streams=streams, remat=remat) for remat in ("none", "dots", "block")
    )
    # The scanned blocks have width D = 32 and N + T = 9 tokens (full: 4 and 5 with separate
    # weights). The products of attention are batched, so `dots` computes them again.
    layers = DEPTH if streams == "shared" else DEPTH - 1
    attention = 2 * (2 * 2 * 9 * 9 * WIDTH)  # two images, two products
    assert dots - none == layers * attention
    assert block - none > layers * (attention + 2 * 2 * 9 * 11 * WIDTH**2)  # qkv and MLP at least


@pytest.mark.parametrize("unroll", [1, 2])
def test_unroll_reaches_the_scan(unroll):
    cond = Cond.of(text())
    model, params = abstract(cond, unroll=unroll)
    jaxpr = jax.make_jaxpr(model.apply)({"params": params}, noise(), T, cond)
    assert [e.params["unroll"] for e in jaxpr.eqns if e.primitive.name == "scan"] == [unroll]


@pytest.mark.parametrize("streams, classes", [("qkv", None), ("shared", CLASSES), ("full", None)])
def test_bf16_is_close_to_f32(streams, classes):
    cond = Cond.of(semantics(classes), control())
    f32, params = build(cond, streams=streams, classes=classes)
    bf16, bf16_params = abstract(cond, streams=streams, classes=classes, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, bf16_params) == jax.tree.map(lambda a: a.dtype, params)
    a, b = (forward(m, params, noise(), T, cond) for m in (f32, bf16))
    assert a.dtype == b.dtype == jnp.float32
    error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
    assert 1e-4 < error < 0.03  # bf16 rounds each operation by up to 0.4%


# ---------------------------------------------------------------------------------------------
# Table A1


def parameters(semantics, **settings):
    """Count the parameters of an XL/2 model on 32 x 32 x 4 latents."""
    depth, width, heads = SIZES["XL"]
    model = MMDiT(depth, width, heads, patch=2, base_grid=16, weighting=Weighting(), **settings)
    args = jnp.zeros((1, 32, 32, 4)), jnp.zeros((1,), jnp.int32), Cond.of(semantics)
    variables = jax.eval_shape(model.init, jax.random.key(0), *args)
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_parameters_of_the_text_model():
    # The count excludes control and the position table, which is not a parameter here.
    text = Text(jnp.zeros((1, 77, 768)), jnp.ones((1, 77), bool), jnp.zeros((1, 768)))
    expected = 791.641e6 - 3.099e6 - 1.180e6
    assert parameters(text, streams="qkv", pooled=True) == pytest.approx(expected, rel=1e-4)
    assert parameters(text, streams="qkv") == pytest.approx(expected, rel=1e-4)  # no pooled MLP


def test_parameters_of_the_class_model():
    # The count is that of DiT-XL/2 without learned sigma, plus the norms of queries and keys.
    label = jnp.zeros((1,), jnp.int32)
    expected = 674.816e6 + 4032
    for pooled in (False, True):
        count = parameters(label, streams="shared", classes=1000, pooled=pooled)
        assert count == pytest.approx(expected, abs=1000)
    plain = parameters(label, streams="shared", classes=1000, qk_norm=False)
    assert count - plain == 28 * 2 * 72


def test_pooled_text_of_another_width_is_rejected_unless_streams_are_full():
    with pytest.raises(ValueError, match="pooled text has 10 channels, its tokens 12"):
        abstract(Cond.of(text()), pooled=True)
    abstract(Cond.of(text()), pooled=True, streams="full")
