"""Conversion of small parameter trees to PyTorch's layout; ../pytorch tests whole models."""

import jax
import numpy as np
import pytest

from condiff_jax.pretrained.layout import check, from_torch, to_torch


def count(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


PARAMS = {
    "fc1": {"kernel": count(2, 3), "bias": count(3)},
    "query": {"linear": {"kernel": count(2, 2, 3), "bias": count(2, 3)}},  # (in, heads, size)
    "out": {"linear": {"kernel": count(2, 3, 1), "bias": count(1)}},  # (heads, size, out)
    "conv": {"kernel": count(1, 3, 2, 1)},  # (height, width, in, out)
    "class_embed": {"embedding": count(2, 1)},
    "query_norm": {"scale": count(2)},
    "positions": count(2, 2),
    "in_blocks": {"modulation": {"table": count(2, 1, 3)}, "mlp": {"fc1": {"bias": count(2, 1)}}},
}
TENSORS = {
    "fc1.weight": [[0, 3], [1, 4], [2, 5]],
    "fc1.bias": [0, 1, 2],
    "query.weight": [[0, 6], [1, 7], [2, 8], [3, 9], [4, 10], [5, 11]],
    "query.bias": [0, 1, 2, 3, 4, 5],
    "out.weight": [[0, 1, 2, 3, 4, 5]],
    "out.bias": [0],
    "conv.weight": [[[[0, 2, 4]], [[1, 3, 5]]]],
    "class_embed.weight": [[0], [1]],
    "query_norm.weight": [0, 1],
    "positions": [[0, 1], [2, 3]],
    "in_blocks.0.modulation.table": [[0, 1, 2]],
    "in_blocks.1.modulation.table": [[3, 4, 5]],
    "in_blocks.0.mlp.fc1.bias": [0],
    "in_blocks.1.mlp.fc1.bias": [1],
}


def test_to_torch():
    tensors = to_torch(PARAMS)
    assert set(tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


def test_projections_compute_the_same():
    """x @ weight.T in PyTorch equals our contraction, with the heads flattened."""
    x, tensors = np.float32([[1, -2]]), to_torch(PARAMS)
    heads = np.einsum("bi,ihc->bhc", x, PARAMS["query"]["linear"]["kernel"])
    np.testing.assert_array_equal(x @ tensors["query.weight"].T, heads.reshape(1, 6))
    merged = np.einsum("bhc,hco->bo", heads, PARAMS["out"]["linear"]["kernel"])
    np.testing.assert_array_equal(heads.reshape(1, 6) @ tensors["out.weight"].T, merged)


def test_from_torch_is_the_inverse_and_keeps_types():
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, np.float16), PARAMS)
    back = from_torch(to_torch(PARAMS), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float16)}
    jax.tree.map(np.testing.assert_array_equal, back, PARAMS)


def test_errors_name_missing_unexpected_and_misshapen_tensors():
    tensors = to_torch(PARAMS)
    del tensors["in_blocks.1.mlp.fc1.bias"]
    tensors |= {"in_blocks.2.mlp.fc1.bias": count(1), "fc1.weight": count(2, 3)}
    with pytest.raises(ValueError) as error:
        from_torch(tensors, PARAMS)
    assert str(error.value) == (
        "weights do not fit: missing in_blocks.1.mlp.fc1.bias; unexpected "
        "in_blocks.2.mlp.fc1.bias; fc1.weight is (2, 3), not (3, 2)"
    )


def test_errors_name_ten_tensors():
    expected = {f"a{i}": (1,) for i in range(7)}
    tensors = {f"b{i}": count(1) for i in range(6)}
    with pytest.raises(ValueError) as error:
        check(tensors, expected)
    names = [f"missing a{i}" for i in range(7)] + [f"unexpected b{i}" for i in range(3)]
    assert str(error.value) == f"weights do not fit: {'; '.join(names)}; and 3 more"
    assert "\n" not in str(error.value)
    check({}, {})
