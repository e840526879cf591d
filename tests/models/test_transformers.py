"""Conditions and options of all transformers; parity is in test_parity."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from benchmarks.parity import CLASSES, T, jit, noise, random_like
from condiff_jax.conditioning.cond import Cond, Control, Text
from condiff_jax.conditioning.control import Weighting
from condiff_jax.models.dit import DiT
from condiff_jax.models.mdt import MDT
from condiff_jax.models.mmdit import MMDiT
from condiff_jax.models.pixart import PixArt

DEPTH, WIDTH, HEADS = 4, 32, 2
KINDS = {
    "dit_ln": (DiT, {}),
    "dit_att": (DiT, {"cross": True}),
    "pixart": (PixArt, {}),
    "mdtv2": (MDT, {}),
    "ours": (MMDiT, {}),
}
# dit_ln and mdtv2 have class conditioning only.
VARIANTS = [(name, CLASSES) for name in KINDS] + [
    (name, None) for name in ("dit_att", "pixart", "ours")
]


def semantics(classes, seed):
    """Two labels or two texts, which differ between seeds."""
    if classes is not None:
        return jnp.array([seed, 2 + seed])
    draw = np.random.default_rng(seed).normal
    tokens, pooled = draw(size=(2, 5, 12)), draw(size=(2, 12))
    return Text(jnp.float32(tokens), jnp.ones((2, 5), bool), jnp.float32(pooled))


def control(low=0.0):
    return Control(jnp.full((2, 3), 100.0), jnp.full((2, 2), 32 + low))


@cache
def shapes(name, classes, controlled=True, **settings):
    """Return (model, shapes of its parameters), with control or without."""
    module, module_settings = KINDS[name]
    defaults = {"depth": DEPTH, "base_grid": 2, "weighting": Weighting(), "classes": classes}
    settings = defaults | module_settings | settings
    model = module(width=WIDTH, heads=HEADS, patch=2, **settings)
    cond = Cond.of(semantics(classes, 0), control() if controlled else None)
    return model, jax.eval_shape(model.init, jax.random.key(0), noise(4), T, cond)["params"]


@cache
def build(name, classes, **settings):
    """Return (model, random parameters)."""
    model, params = shapes(name, classes, **settings)
    return model, random_like(params)


@partial(jit, static_argnums=0)
def forward(model, params, t, cond):
    return model.apply({"params": params}, noise(4), t, cond)


def change(model, params, cond1, cond2, t=T):
    """Largest change of each sample's output (B,) between two conditions."""
    a, b = (np.asarray(forward(model, params, t, cond)) for cond in (cond1, cond2))
    return np.abs(a - b).max((1, 2, 3))


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_conditions_have_an_effect_unless_dropped(name, classes):
    cond1, cond2 = (Cond.of(semantics(classes, seed), control()) for seed in (0, 1))
    model, params = build(name, classes)
    assert (change(model, params, cond1, cond2) > 1e-3).all()
    dropped = [c.replace(drop_semantics=jnp.array([True, False])) for c in (cond1, cond2)]
    assert (change(model, params, *dropped) > 1e-3).tolist() == [False, True]
    null = (
        jax.tree.map(jnp.zeros_like, cond1.semantics) if classes is None else jnp.full(2, CLASSES)
    )
    explicit = change(model, params, dropped[0], cond1.replace(semantics=null))
    np.testing.assert_allclose(explicit[0], 0, atol=1e-5)

    # phi_l has an effect near t = 0 only, and none when control is dropped.
    sized, t = cond1.replace(control=control(7.0)), jnp.array([0, 995])
    assert (change(model, params, cond1, sized, t) > 1e-3).tolist() == [True, False]
    dropped = [c.drop(semantics=False, control=True) for c in (cond1, sized)]
    np.testing.assert_allclose(change(model, params, *dropped, t), 0, atol=1e-6)


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_without_control_there_are_no_control_parameters(name, classes):
    _, params = shapes(name, classes, controlled=False)
    _, with_control = shapes(name, classes)
    assert set(with_control) - set(params) == {"control"}


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_qk_norm_applies_to_attention_to_conditions(name, classes):
    _, params = shapes(name, classes)
    _, without = shapes(name, classes, qk_norm=False)
    norms = {path[:-1] for path in set(flatten_dict(params)) - set(flatten_dict(without))}
    assert all(path[-1] in ("query_norm", "key_norm") or "context" in path[-1] for path in norms)
    module = {"dit_att": "cross", "pixart": "cross", "ours": "blocks"}.get(name)
    assert {path[-2] for path in norms} == ({module} if module else set())


# The fast suite initializes each architecture once, with classes; test_mmdit.py has `ours`.
INITIALIZED = [
    v if v[0] != "ours" and v[1] else pytest.param(*v, marks=pytest.mark.slow) for v in VARIANTS
]


@pytest.mark.parametrize("name, classes", INITIALIZED)
def test_output_is_zero_at_initialization(name, classes):
    cond = Cond.of(semantics(classes, 0), control())
    model, _ = shapes(name, classes)
    out, variables = jit(model.init_with_output)(jax.random.key(0), noise(4), T, cond)
    np.testing.assert_array_equal(out, 0)
    if (
        name == "pixart"
    ):  # the initial gates are random with standard deviation D^-1/2, as published
        return
    # Blocks are the identity: each branch has a zero gate or a zero projection.
    flat = flatten_dict(variables["params"], sep="/")
    for path, value in flat.items():
        if "modulation" in path or "cross/out" in path or path.startswith("final/"):
            assert not np.any(value), path


# The fast suite tests what all architectures share once; the slow suite tests every pair.
REMAT = [("dit_att", {"remat": "dots"})]
REMAT += [(name, {"remat": "block", "unroll": 2}) for name in ("dit_att", "pixart", "mdtv2")]
REMAT += [
    pytest.param(name, {"remat": "dots"}, marks=pytest.mark.slow) for name in ("pixart", "mdtv2")
]


@cache
def gradients(name, **settings):
    """Loss and gradients with two blocks, for MDT with two blocks in its decoder."""
    depth = 4 if name == "mdtv2" else 2
    model, params = build(name, CLASSES, depth=depth)
    model = model.clone(**settings)
    cond = Cond.of(semantics(CLASSES, 0), control())

    def loss(params):
        eps = model.apply({"params": params}, noise(4), T, cond)
        return (jnp.tanh(eps) * noise(4, 6)).sum()

    return jax.tree.leaves(jit(jax.value_and_grad(loss))(params))


@pytest.mark.parametrize("name, settings", REMAT)
def test_remat_and_unroll_change_nothing(name, settings):
    for a, b in zip(gradients(name, **settings), gradients(name), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", ["dit_ln", "dit_att", "pixart", "mdtv2"])
def test_bf16_is_close_to_f32(name):
    cond = Cond.of(semantics(CLASSES, 0), control())
    f32, params = build(name, CLASSES)
    bf16, bf16_params = shapes(name, CLASSES, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, bf16_params) == jax.tree.map(lambda a: a.dtype, params)
    a, b = (forward(m, params, T, cond) for m in (f32, bf16))
    assert a.dtype == b.dtype == jnp.float32
    assert 1e-4 < np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.05
