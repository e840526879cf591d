"""What every transformer must do with its conditions and options; parity is in test_parity."""

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
# dit_ln and mdtv2 know classes only.
VARIANTS = [(name, CLASSES) for name in KINDS] + [
    (name, None) for name in ("dit_att", "pixart", "ours")
]


def semantics(classes, seed):
    """Two labels or texts that differ between seeds."""
    if classes is not None:
        return jnp.array([seed, 2 + seed])
    draw = np.random.default_rng(seed).normal
    tokens, pooled = draw(size=(2, 5, 12)), draw(size=(2, 12))
    return Text(jnp.float32(tokens), jnp.ones((2, 5), bool), jnp.float32(pooled))


def control(low=0.0):
    return Control(jnp.full((2, 3), 100.0), jnp.full((2, 2), 32 + low))


@cache
def shapes(name, classes, controlled=True, **settings):
    """(model, shapes of its parameters), with control or without."""
    module, own = KINDS[name]
    defaults = {"base_grid": 2, "weighting": Weighting(), "classes": classes, **own}
    model = module(width=WIDTH, heads=HEADS, patch=2, **({"depth": DEPTH} | defaults | settings))
    cond = Cond.of(semantics(classes, 0), control() if controlled else None)
    return model, jax.eval_shape(model.init, jax.random.key(0), noise(4), T, cond)["params"]


@cache
def build(name, classes, **settings):
    """(model, random parameters)."""
    model, params = shapes(name, classes, **settings)
    return model, random_like(params)


@partial(jit, static_argnums=0)
def forward(model, params, t, cond):
    return model.apply({"params": params}, noise(4), t, cond)


def change(model, params, one, other, t=T):
    """Largest change of each sample's output (B,) between two conditions."""
    a, b = (np.asarray(forward(model, params, t, cond)) for cond in (one, other))
    return np.abs(a - b).max((1, 2, 3))


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_conditions_are_heard_until_dropped(name, classes):
    one, other = (Cond.of(semantics(classes, seed), control()) for seed in (0, 1))
    model, params = build(name, classes)
    assert (change(model, params, one, other) > 1e-3).all()
    dropped = [c.replace(drop_semantics=jnp.array([True, False])) for c in (one, other)]
    assert (change(model, params, *dropped) > 1e-3).tolist() == [False, True]
    null = jax.tree.map(jnp.zeros_like, one.semantics) if classes is None else jnp.full(2, CLASSES)
    explicit = change(model, params, dropped[0], one.replace(semantics=null))
    np.testing.assert_allclose(explicit[0], 0, atol=1e-5)

    # Control: phi_l is heard near t = 0 only, and not when dropped.
    sized, t = one.replace(control=control(7.0)), jnp.array([0, 995])
    assert (change(model, params, one, sized, t) > 1e-3).tolist() == [True, False]
    dropped = [c.drop(semantics=False, control=True) for c in (one, sized)]
    np.testing.assert_allclose(change(model, params, *dropped, t), 0, atol=1e-6)


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_control_off_leaves_no_trace(name, classes):
    _, params = shapes(name, classes, controlled=False)
    _, more = shapes(name, classes)
    assert set(more) - set(params) == {"control"}


@pytest.mark.parametrize("name, classes", VARIANTS)
def test_qk_norm_is_where_attention_sees_conditions(name, classes):
    found = (shapes(name, classes, **settings) for settings in ({}, {"qk_norm": False}))
    names = [set(flatten_dict(params)) for _, params in found]
    norms = {path[:-1] for path in names[0] - names[1]}
    assert all(path[-1] in ("query_norm", "key_norm") or "context" in path[-1] for path in norms)
    place = {"dit_att": "cross", "pixart": "cross", "ours": "blocks"}.get(name)
    assert {path[-2] for path in norms} == ({place} if place else set())


# Of each architecture once; test_mmdit.py starts those of `ours`, and text changes nothing here.
STARTED = [
    v if v[0] != "ours" and v[1] else pytest.param(*v, marks=pytest.mark.slow) for v in VARIANTS
]


@pytest.mark.parametrize("name, classes", STARTED)
def test_nothing_is_predicted_at_the_start(name, classes):
    cond = Cond.of(semantics(classes, 0), control())
    model, _ = shapes(name, classes)
    out, variables = jit(model.init_with_output)(jax.random.key(0), noise(4), T, cond)
    np.testing.assert_array_equal(out, 0)
    if name == "pixart":  # its gates start at random values of size D^-1/2, as published
        return
    # Blocks are the identity: what each adds is behind a zero gate or a zero projection.
    flat = flatten_dict(variables["params"], sep="/")
    for path, value in flat.items():
        if "modulation" in path or "cross/out" in path or path.startswith("final/"):
            assert not np.any(value), path


# What all share is compared once; the slow suite has every pair.
REMAT = [("dit_att", {"remat": "dots"})]
REMAT += [(name, {"remat": "block", "unroll": 2}) for name in ("dit_att", "pixart", "mdtv2")]
REMAT += [
    pytest.param(name, {"remat": "dots"}, marks=pytest.mark.slow) for name in ("pixart", "mdtv2")
]


@cache
def gradients(name, **settings):
    """Loss and gradients with two blocks, of MDT in its decoder."""
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
    bf16, other = shapes(name, CLASSES, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, other) == jax.tree.map(lambda a: a.dtype, params)
    a, b = (forward(m, params, T, cond) for m in (f32, bf16))
    assert a.dtype == b.dtype == jnp.float32
    assert 1e-4 < np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2)) < 0.05
