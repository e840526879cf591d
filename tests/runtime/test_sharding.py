"""Sharding rules: complete, unambiguous, and splitting each dimension as documented."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from condiff_jax.models import MODELS, clip, conditioners, kl, transformer
from condiff_jax.models.autoencoder import NETWORKS
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.runs.checkpoint import abstract_state
from condiff_jax.runtime import sharding
from configs import base

VOCABULARY = Vocabulary(words=("a", "red", "circle"), classes=("circle", "square"))
VARIANTS = [
    (name, streams, semantics)
    for name in ("ours", "mmdit")
    for streams in ("shared", "qkv", "full")
    for semantics in ("text", "class")
] + [
    (name, "auto", semantics)
    for name, architecture in MODELS.items()
    if name not in ("ours", "mmdit", "unet2d")
    for semantics in (("text", "class") if architecture.text else ("class",))
]
METHODS = [("unet2d", "auto", "class", method) for method in conditioners.names()]


def create(name="ours", streams="auto", semantics="text", **overrides):
    """Create a small objective of the default config, with every group of control scalars."""
    values = base.get_config()
    overrides |= {
        "model.name": name,
        "model.size": "tiny/4" if MODELS[name].patched else "tiny",
        "model.streams": streams,
        "data.semantics": semantics,
        "conditioning.control": ("crop", "flip", "aspect", "size"),
    }
    values.update_from_flattened_dict(overrides)
    return diffusion.create(create_config(values), VOCABULARY)


def names(tree):
    return {sharding.path_name(p): a for p, a in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    "name, streams, semantics, method", [*((*v, "film") for v in VARIANTS), *METHODS]
)
def test_every_parameter_matches_exactly_one_rule(name, streams, semantics, method):
    built = create(name, streams, semantics, **{"model.conditioner": method})
    params = jax.eval_shape(built.init, jax.random.key(0))
    for parameter, leaf in names(params).items():
        specs = sharding.matching_rules(parameter)
        assert len(specs) == 1, parameter
        assert len(specs[0]) <= leaf.ndim, parameter
        large = leaf.ndim >= 2 and not parameter.endswith(
            ("bias", "scale", "text_encoder/positions")
        )
        assert ("fsdp" in specs[0]) == large, parameter


@pytest.mark.parametrize("streams", ["qkv", "full"])
def test_every_leaf_of_the_training_state_has_a_sharding(streams):
    mesh = sharding.create_mesh(4)
    state = abstract_state(create("mmdit", streams), mesh)
    specs = {name: leaf.sharding.spec for name, leaf in names(state).items()}
    assert specs["step"] == P()
    for parameter, spec in specs.items():
        if parameter.startswith("params/"):
            copies = [p for p in specs if p.endswith(parameter.removeprefix("params"))]
            assert len(copies) == 4, parameter  # itself, EMA, two moments
            assert {specs[p] for p in copies} == {spec}


L, D, H = 6, 128, 4  # the width is divisible by four devices
EXPECTED = {
    "qkv": {
        "model/blocks/query/linear/kernel": ((L, D, H, D // H), P(None, "fsdp", None, None)),
        "model/blocks/context_key/linear/kernel": ((L, D, H, D // H), P(None, "fsdp", None, None)),
        "model/blocks/value/linear/bias": ((L, H, D // H), P(None, None, None)),
        "model/blocks/key_norm/scale": ((L, D // H), P(None, None)),
        "model/blocks/out/linear/kernel": ((L, H, D // H, D), P(None, None, None, "fsdp")),
        "model/blocks/mlp/fc1/kernel": ((L, D, 4 * D), P(None, "fsdp", None)),
        "model/blocks/mlp/fc2/kernel": ((L, 4 * D, D), P(None, "fsdp", None)),
        "model/blocks/modulation/linear/kernel": ((L, D, 6 * D), P(None, "fsdp", None)),
        "model/patch_embed/kernel": ((48, D), P(None, "fsdp")),
        "model/caption/fc1/kernel": ((128, D), P("fsdp", None)),
        "model/timestep/mlp/fc1/kernel": ((256, D), P("fsdp", None)),
        "model/control/low/fc2/kernel": ((D, D), P("fsdp", None)),
        "model/final_modulation/linear/kernel": ((D, 2 * D), P("fsdp", None)),
        "model/final/kernel": ((D, 48), P("fsdp", None)),
        "text_encoder/words/embedding": ((5, 128), P(None, "fsdp")),
        "text_encoder/positions": ((24, 128), P(None, None)),
    },
    "full": {
        "model/blocks/context_modulation/linear/kernel": ((5, D, 6 * D), P(None, "fsdp", None)),
        "model/blocks/context_out/linear/kernel": ((5, H, 32, D), P(None, None, None, "fsdp")),
        "model/last_block/context_query/linear/kernel": ((D, H, D // H), P("fsdp", None, None)),
        "model/last_block/out/linear/kernel": ((H, D // H, D), P(None, None, "fsdp")),
        "model/last_block/mlp/fc2/kernel": ((4 * D, D), P("fsdp", None)),
        "model/last_block/context_modulation/linear/kernel": ((D, 2 * D), P("fsdp", None)),
        "model/last_block/query_norm/scale": ((D // H,), P(None)),
        "model/caption/kernel": ((128, D), P(None, "fsdp")),
        "model/pooled/fc2/kernel": ((D, D), P("fsdp", None)),
    },
}


@pytest.mark.parametrize("streams", EXPECTED)
def test_shardings_of_known_parameters(streams, monkeypatch):
    monkeypatch.setitem(transformer.SIZES, "tiny", (L, D, H))
    mesh = sharding.create_mesh(4)
    params = jax.eval_shape(create("mmdit", streams).init, jax.random.key(0))
    shardings = names(sharding.tree_shardings(mesh, params))
    shapes = {name: leaf.shape for name, leaf in names(params).items()}
    for name, (shape, spec) in EXPECTED[streams].items():
        assert shapes[name] == shape, name
        assert shardings[name].spec == spec, name
        assert shardings[name].mesh == mesh


@pytest.mark.parametrize("name", ["model/blocks/rope/kernel", "decoder/kernel", "weights"])
def test_unknown_parameters_are_an_error(name):
    tree = jnp.zeros((2, 2))
    for part in reversed(name.split("/")):
        tree = {part: tree}
    with pytest.raises(ValueError, match=f"{name} matches 0 sharding rules, expected exactly one"):
        sharding.tree_shardings(sharding.create_mesh(), tree)


def test_ambiguous_parameters_are_an_error(monkeypatch):
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"fc1/.*", P())))
    with pytest.raises(ValueError, match="mlp/fc1/kernel matches 2 sharding rules"):
        sharding.tree_shardings(
            sharding.create_mesh(), {"mlp": {"fc1": {"kernel": np.zeros((4, 4))}}}
        )


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_dimensions_that_do_not_divide_are_replicated(fsdp):
    tree = {"model": {"final": {"kernel": np.zeros((6, 8)), "bias": np.zeros(8)}, "step": 0.0}}
    tree["model"]["step"] = np.zeros(())  # scalars need no rule
    shardings = sharding.tree_shardings(sharding.create_mesh(fsdp), tree)["model"]
    axis = None if fsdp == 8 else "fsdp"  # 6 rows
    assert shardings["final"]["kernel"].spec == P(axis, None)
    assert shardings["final"]["bias"].spec == P(None)
    assert shardings["step"].spec == P()


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_mesh(fsdp):
    mesh = sharding.create_mesh(fsdp)
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}


@pytest.mark.parametrize("devices, fsdp", [(1, 1), (6, 2), (8, 8)])
def test_mesh_with_as_much_fsdp_as_divides(devices, fsdp):
    mesh = sharding.create_mesh(0, jax.devices()[:devices])
    assert dict(mesh.shape) == {"data": devices // fsdp, "fsdp": fsdp}


@pytest.mark.parametrize("fsdp", [3, 16])
def test_mesh_needs_a_divisor(fsdp):
    with pytest.raises(ValueError, match=f"parallel.fsdp={fsdp} must divide .* devices, 8"):
        sharding.create_mesh(fsdp)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_batches_are_split_over_all_devices(fsdp):
    mesh = sharding.create_mesh(fsdp)
    batch = {"x": np.arange(32).reshape(16, 2), "label": np.arange(16)}
    placed = sharding.put_batch(mesh, batch)
    np.testing.assert_array_equal(placed["x"], batch["x"])
    assert {s.data.shape for s in placed["x"].addressable_shards} == {(2, 2)}
    assert {s.data.shape for s in placed["label"].addressable_shards} == {(2,)}
    whole = jax.device_put(batch["x"], sharding.replicated(mesh))
    assert {s.data.shape for s in whole.addressable_shards} == {(16, 2)}


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_frozen_autoencoders_are_split_like_trained_networks(kind):
    network = NETWORKS[kind](kl.SIZES["tiny"])
    shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    assert_mostly_split({"autoencoder": shapes})


def test_frozen_text_towers_are_split_like_trained_networks():
    size = clip.Size(words=64, length=8, width=32, depth=2, heads=2, hidden=64, end=2)
    ids = jnp.zeros((1, 8), jnp.int32)
    shapes = jax.eval_shape(clip.TextTower(size).init, jax.random.key(0), ids, ids == 0)["params"]
    assert_mostly_split({"text_encoder": shapes})


def test_frozen_lpips_is_replicated():
    kernel, head = np.ones((3, 3, 4, 8), np.float32), np.ones(8, np.float32)
    conv = {"conv_0": {"kernel": kernel, "bias": head}}
    for name in ("alexnet", "vgg16"):
        tree = {"lpips": {name: conv, "heads": [head, head]}}
        placed = sharding.put(sharding.create_mesh(4), tree)
        assert all(array.is_fully_replicated for array in jax.tree.leaves(placed))


def assert_mostly_split(shapes):
    tree = jax.tree.map(lambda a: np.ones(a.shape, np.float32), shapes)
    placed = jax.tree.leaves(sharding.put(sharding.create_mesh(4), tree))
    on_one_device = sum(array.addressable_shards[0].data.size for array in placed)
    assert on_one_device < 0.3 * sum(array.size for array in placed)
