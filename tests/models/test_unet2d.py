"""UNet2D: sizes of the benchmark, class-conditioning methods, and a method from a new file."""

import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks import parity
from condiff_jax.conditioning.cond import Cond
from condiff_jax.conditioning.control import Weighting
from condiff_jax.config.errors import ConfigError
from condiff_jax.models import conditioners
from condiff_jax.models.unet2d import SIZES, Size, UNet2D
from tests import tiny

CLASSES = 5
MINIMAL = Size((8,), (False,), resnets=1, groups=4)
SIDE = 4
T = jnp.array([3, 700])
METHODS = ("adanorm", "cross_attn", "film", "ours_none", "weighted_attn")
FADING = Weighting("step", last=500)  # 1 at the first of T, 0 at the second


def of_class(first, second):
    return Cond.of(jnp.array([first, second]))


@cache
def build(name, **settings):
    """Return (model, random parameters)."""
    model = UNet2D(MINIMAL, CLASSES, FADING, conditioner=name, **settings)
    return model, parity.random_like(jax.eval_shape(*initial(model))["params"])


def initial(model):
    """Return the initialization function of a model, and its arguments."""
    return model.init, jax.random.key(0), parity.noise(SIDE), T, of_class(0, 1)


@partial(parity.jit, static_argnums=0)
def apply(model, params, cond):
    return model.apply({"params": params}, parity.noise(SIDE), T, cond)


def predict(model, params, cond):
    return np.asarray(apply(model, params, cond))


def changed(model, params, cond1, cond2):
    """Whether the output of each example differs between two conditions."""
    difference = predict(model, params, cond1) - predict(model, params, cond2)
    return (np.abs(difference).max((1, 2, 3)) > 1e-3).tolist()


def without(params, *parts):
    """Return the parameters with zeros in modules whose path contains one of the parts."""
    flat = flatten_dict(params, sep="/")
    zeroed = {k: 0 * v for k, v in flat.items() if any(part in k for part in parts)}
    assert zeroed
    return unflatten_dict(flat | zeroed, sep="/")


@pytest.mark.parametrize(
    "name, method, count",
    [
        ("small", "film", 8_952_067),
        ("small", "adanorm", 8_952_067),
        ("medium", "cross_attn", 35_746_307),
        ("large", "weighted_attn", 142_861_315),
    ],
)
def test_backbones_have_the_published_sizes_before_conditioning(name, method, count):
    """The counts are those of diffusers' UNet2DModel: 8.95, 35.75 and 142.86 million."""
    model = UNet2D(SIZES[name], 10, FADING, conditioner=method)
    x, cond = jnp.zeros((1, 32, 32, 3)), Cond.of(jnp.zeros((1,), jnp.int32))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, T[:1], cond)["params"]
    backbone = {k: v for k, v in shapes.items() if k != "class_embed" and "_class_" not in k}
    assert sum(leaf.size for leaf in jax.tree.leaves(backbone)) == count
    if name == "small":
        with torch.device("meta"):
            reference = parity.diffusers_unet2d(32, SIZES[name], classes=0)
        assert sum(p.numel() for p in reference.parameters()) == count


def test_methods_are_the_files_and_each_is_short():
    assert set(METHODS) <= set(conditioners.names())
    (folder,) = conditioners.__path__
    for name in conditioners.names():
        assert len((Path(folder) / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("name", METHODS)
def test_the_class_has_an_effect_in_all_methods_but_ours_none(name):
    model, params = build(name)
    assert changed(model, params, of_class(0, 1), of_class(2, 1)) == [name != "ours_none", False]


def test_the_class_and_null_embeddings_are_initialized_as_standard_normals():
    init, *arguments = initial(build("film")[0])
    # Only the table is returned, so that no other layer is compiled.
    table = parity.jit(lambda *args: init(*args)["params"]["class_embed"]["embedding"])(*arguments)
    assert table.shape == (CLASSES + 1, 4 * MINIMAL.channels[0])
    assert 0.7 < table.std() < 1.3


@pytest.mark.parametrize("name", METHODS)
def test_a_dropped_class_is_the_null_class(name):
    model, params = build(name)
    drop = jnp.array([True, False])
    cond1, cond2 = (c.replace(drop_semantics=drop) for c in (of_class(0, 1), of_class(3, 1)))
    null = of_class(CLASSES, 1)
    np.testing.assert_array_equal(predict(model, params, cond1), predict(model, params, cond2))
    np.testing.assert_array_equal(predict(model, params, cond1), predict(model, params, null))


@pytest.mark.parametrize(
    "name, parts",
    [
        ("film", ("time/kernel",)),
        ("cross_attn", ("attention/out",)),
        ("adanorm", ("modulation",)),
        ("weighted_attn", ("class_0/out", "class_1/out")),
    ],
)
def test_the_class_enters_in_one_way_only(name, parts):
    model, params = build(name)
    assert changed(model, without(params, *parts), of_class(0, 1), of_class(2, 3)) == [False] * 2


@pytest.mark.parametrize("name", ["cross_attn", "adanorm", "weighted_attn"])
def test_conditioners_are_the_identity_at_initialization(name):
    """The conditioners have their initial parameters, and all other layers random ones."""
    model, params = build(name)
    init, *arguments = initial(model)

    # Only these parameters are returned, so that no other layer is compiled.
    @parity.jit
    def initial_conditioners(*args):
        return {k: v for k, v in init(*args)["params"].items() if "_class_" in k}

    mixed = params | initial_conditioners(*arguments)
    assert mixed.keys() == params.keys()
    plain, _ = build("ours_none")
    bare = {k: v for k, v in params.items() if "_class_" not in k}
    cond = of_class(0, 1)
    np.testing.assert_allclose(
        predict(model, mixed, cond), predict(plain, bare, cond), rtol=1e-5, atol=1e-5
    )


def test_weighted_attn_adds_details_where_gamma_is_not_zero():
    model, params = build("weighted_attn")
    flat = flatten_dict(params, sep="/")
    # The first half of each projection is coarse, the second half details.
    half = {
        k: jnp.concatenate([0 * v[..., : v.shape[-1] // 2], v[..., v.shape[-1] // 2 :]], -1)
        for k, v in flat.items()
        if "_class_" in k and "/out/" in k
    }
    details = unflatten_dict(flat | half, sep="/")
    assert changed(model, details, of_class(0, 1), of_class(2, 3)) == [True, False]


def test_queries_matter_with_several_class_tokens():
    """Queries have an effect in weighted_attn, but not with the single token of cross_attn."""
    effect = {}
    for name in ("cross_attn", "weighted_attn"):
        model, params = build(name)
        # Without queries, all tokens have the same attention weight.
        ablated = {k: without(v, "query") if "_class_" in k else v for k, v in params.items()}
        cond = of_class(0, 1)
        effect[name] = np.abs(predict(model, params, cond) - predict(model, ablated, cond)).max()
    assert effect["cross_attn"] < 1e-5 and effect["weighted_attn"] > 1e-3


def test_remat_and_bf16_compute_the_same():
    model, params = build("weighted_attn")
    expected = predict(model, params, of_class(0, 1))
    remat, _ = build("weighted_attn", remat="block")
    np.testing.assert_allclose(predict(remat, params, of_class(0, 1)), expected, atol=1e-5)
    bf16, bf16_params = build("weighted_attn", dtype=jnp.bfloat16)
    assert jax.tree.map(jnp.shape, bf16_params) == jax.tree.map(jnp.shape, params)
    out = predict(bf16, params, of_class(0, 1))
    assert out.dtype == np.float32
    error = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 0.05  # bf16 rounds each operation by up to 0.4%


NEW = '''
"""The class multiplies the time embedding."""


def prepare_conditioning(time_emb, class_emb):
    return time_emb * class_emb
'''


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Add a temporary folder to the package of methods."""
    monkeypatch.setattr(conditioners, "__path__", [*conditioners.__path__, str(tmp_path)])
    yield tmp_path
    for name in set(sys.modules):
        if name.startswith("condiff_jax.models.conditioners.new_"):
            del sys.modules[name]


def test_a_new_file_is_a_method_by_its_name(folder):
    fields = {"model.name": "unet2d", "model.size": "tiny", "data.semantics": "class"}
    fields |= {"data.classes": 10, "model.conditioner": "new_product"}
    with pytest.raises(
        ConfigError, match="unknown value 'new_product'; choose from .*, cross_attn"
    ):
        tiny.config(**fields)
    (folder / "new_product.py").write_text(NEW)
    assert tiny.objective(tiny.config(**fields)).model.conditioner == "new_product"
    model, params = build("new_product")
    assert changed(model, params, of_class(0, 1), of_class(2, 1)) == [True, False]
    added = predict(build("film")[0], params, of_class(0, 1))
    assert np.abs(predict(model, params, of_class(0, 1)) - added).max() > 1e-3


def test_methods_are_for_unet2d_only():
    with pytest.raises(ConfigError, match="model.conditioner: must be film for model.name=ours"):
        tiny.config(**{"model.conditioner": "adanorm"})
