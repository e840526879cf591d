"""Key maps of published checkpoints: round trips, forms by hand, error messages."""

import jax
import numpy as np
import pytest

from benchmarks import parity
from condiff_jax.models import kl
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.key_maps import Rule, from_published, to_published
from condiff_jax.pretrained.layout import from_torch, to_torch


def count(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def random(model, *args, **inputs):
    """Create random parameters of a model, in our layout."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args, **inputs)["params"]
    return jax.tree.map(np.asarray, parity.random_like(shapes))


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: f"{case.name}-{case.original}")
def test_round_trip_changes_no_bit(case):
    side = parity.SIDES[0]
    conditioning = () if case.cond is None else (parity.T, case.cond)
    params = random(case.create(side), parity.noise(side), *conditioning, **case.inputs(side))
    tensors = to_torch(params)
    state = to_published(tensors, case.rules)
    back = from_published(state, case.rules)
    assert set(back) == set(tensors)
    jax.tree.map(np.testing.assert_array_equal, from_torch(back, params), params)
    jax.tree.map(np.testing.assert_array_equal, to_published(back, case.rules), state)


def test_old_names_of_the_autoencoder():
    params = random(kl.AutoencoderKL(kl.Size((8, 16), resnets=1)), np.zeros((1, 8, 8, 3)))
    rules = key_maps.AUTOENCODER
    state = to_published(to_torch(params), rules)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    back = from_torch(from_published(state, rules), params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_names_without_a_rule():
    rules = key_maps.facebook_dit(patch=2)
    with pytest.raises(ValueError, match=r"^no rule for blocks\.0\.other\.weight, other$"):
        to_published({"other": count(1), "blocks.0.other.weight": count(1)}, rules)
    with pytest.raises(ValueError, match=r"^no rule for pos_embed$"):
        from_published({"pos_embed": count(1)}, rules)
    many = {f"x{i:02}": count(1) for i in range(12)}
    with pytest.raises(ValueError, match=r"^no rule for x00, x01, .*, x09 and 2 more$"):
        from_published(many, rules)


def test_packed_queries_keys_and_values():
    rules = [Rule(("*.query", "*.key", "*.value"), "h.*.qkv", key_maps.PACKED)]
    tensors = {f"7.{name}.weight": count(1, 2) + 10 * i for i, name in enumerate(("query", "key"))}
    tensors |= {"7.value.weight": count(1, 2) + 20, "7.query.bias": count(1)}
    tensors |= {"7.key.bias": count(1) + 1, "7.value.bias": count(1) + 2}
    published = to_published(tensors, rules)
    assert set(published) == {"h.7.qkv.weight", "h.7.qkv.bias"}
    np.testing.assert_array_equal(published["h.7.qkv.weight"], [[0, 1], [10, 11], [20, 21]])
    np.testing.assert_array_equal(published["h.7.qkv.bias"], [0, 1, 2])
    jax.tree.map(np.testing.assert_array_equal, from_published(published, rules), tensors)


def test_swapped_halves():
    rules = [Rule("norm", "norm", key_maps.SWAPPED)]
    tensors = {"norm.weight": count(4, 1), "norm.bias": count(4)}
    published = to_published(tensors, rules)
    np.testing.assert_array_equal(published["norm.weight"], [[2], [3], [0], [1]])
    np.testing.assert_array_equal(published["norm.bias"], [2, 3, 0, 1])
    jax.tree.map(np.testing.assert_array_equal, from_published(published, rules), tensors)


def test_patches():
    rules = [Rule("patch_embed", "proj", key_maps.patches(2))]
    # A patch has 2 x 2 pixels and two channels, which are last in our layout and first in theirs.
    tensors = {"patch_embed.weight": count(1, 8), "patch_embed.bias": count(1)}
    published = to_published(tensors, rules)
    expected = [[[[0, 2], [4, 6]], [[1, 3], [5, 7]]]]
    np.testing.assert_array_equal(published["proj.weight"], expected)
    np.testing.assert_array_equal(published["proj.bias"], [0])
    jax.tree.map(np.testing.assert_array_equal, from_published(published, rules), tensors)


def test_leading_dimension_and_copies():
    batched = [Rule("positions", "pos_embed", key_maps.BATCHED)]
    assert to_published({"positions": count(2, 3)}, batched)["pos_embed"].shape == (1, 2, 3)
    copied = [Rule("t", "a.t"), Rule("t", "b.t", key_maps.COPY)]
    published = to_published({"t.weight": count(2)}, copied)
    np.testing.assert_array_equal(published["a.t.weight"], published["b.t.weight"])
    back = from_published(published | {"b.t.weight": count(2) + 1}, copied)
    assert list(back) == ["t.weight"]
    np.testing.assert_array_equal(back["t.weight"], [0, 1])


def test_the_first_matching_rule_applies():
    """The rule of SD3's last block swaps the context modulation; that of other blocks does not."""
    rules = key_maps.sd3(patch=2, depth=3)
    names = ("blocks.1.context_modulation", "last_block.context_modulation")
    published = to_published({f"{name}.bias": count(4) for name in names}, rules)
    block = "transformer_blocks.{}.norm1_context.linear.bias"
    np.testing.assert_array_equal(published[block.format(1)], [0, 1, 2, 3])
    np.testing.assert_array_equal(published[block.format(2)], [2, 3, 0, 1])
    assert set(from_published(published, rules)) == {f"{name}.bias" for name in names}
