"""Common layers: patches, positions, norms and attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from condiff_jax.models import layers


def test_patchify_by_hand():
    # 2 x 4 pixels with channels (n, 10 n): two patches of two rows each
    n = np.arange(8).reshape(1, 2, 4, 1)
    patches = layers.patchify(jnp.asarray(np.concatenate([n, 10 * n], -1)), 2)
    np.testing.assert_array_equal(
        patches, [[[0, 0, 1, 10, 4, 40, 5, 50], [2, 20, 3, 30, 6, 60, 7, 70]]]
    )


def test_patches_are_in_row_order():
    patches = layers.patchify(jnp.arange(24).reshape(1, 4, 6, 1), 2)
    np.testing.assert_array_equal(patches[0, :, 0], [0, 2, 4, 12, 14, 16])


@pytest.mark.parametrize("shape, patch", [((2, 4, 6, 3), 2), ((1, 9, 3, 2), 3), ((2, 2, 5, 1), 1)])
def test_unpatchify_inverts_patchify(shape, patch):
    x = jax.random.normal(jax.random.key(0), shape)
    tokens = layers.patchify(x, patch)
    assert tokens.shape == (shape[0], shape[1] * shape[2] // patch**2, patch**2 * shape[3])
    np.testing.assert_array_equal(layers.unpatchify(tokens, patch, *shape[1:3]), x)


def test_position_embedding_agrees_with_diffusers():
    table = get_2d_sincos_pos_embed(24, 6, base_size=6).numpy()
    embedding = layers.position_embedding(24, 6, 6, base=3, mode="extrapolate")
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, table, atol=1e-6)
    # With more columns than rows, the table is the upper part of the square.
    embedding = layers.position_embedding(24, 4, 6, base=3, mode="extrapolate")
    np.testing.assert_allclose(embedding, table.reshape(6, 6, 24)[:4].reshape(24, 24), atol=1e-6)


def test_position_embedding_by_hand():
    # The column comes first, then the row: sines of (x, x / 100), then their cosines.
    embedding = layers.position_embedding(8, 2, 3, base=4).reshape(2, 3, 8)

    def encode(x):
        return [np.sin(x), np.sin(x / 100), np.cos(x), np.cos(x / 100)]

    np.testing.assert_allclose(embedding[1, 1], [*encode(2), *encode(4)], atol=1e-6)
    np.testing.assert_allclose(embedding[0, 2], [*encode(4), *encode(0)], atol=1e-6)


@pytest.mark.parametrize("grid", [4, 8, 32])
def test_resampled_positions_have_the_same_limits_at_every_resolution(grid):
    positions = layers.position_grid(grid, 4, "resample")
    np.testing.assert_allclose(positions, np.linspace(0, 4, grid))  # pseudocode 1
    assert positions[0] == 0 and positions[-1] == 4
    np.testing.assert_array_equal(layers.position_grid(grid, 4), positions)
    corners = [0, grid - 1, -grid, -1]
    embedding = layers.position_embedding(16, grid, grid, base=4)[corners]
    base = layers.position_embedding(16, 4, 4, base=4)[[0, 3, -4, -1]]
    np.testing.assert_allclose(embedding, base, atol=1e-6)


def test_extrapolated_positions_count_on():
    np.testing.assert_array_equal(layers.position_grid(6, 4, "extrapolate"), np.arange(6))


def test_bad_position_mode():
    with pytest.raises(ValueError, match="unknown position embedding 'rope', choose resample"):
        layers.position_embedding(8, 2, 2, base=2, mode="rope")


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])  # at 1e-3 the epsilon matters
def test_layer_norm_agrees_with_torch(scale):
    x = scale * (3 + np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (12,), eps=1e-6).numpy()
    np.testing.assert_allclose(layers.layer_norm(jnp.asarray(x)), expected, atol=1e-5)


def test_layer_norm_computes_in_f32():
    x = jnp.asarray(np.random.default_rng(0).normal(50, 1, (2, 512)), jnp.bfloat16)
    out = layers.layer_norm(x)
    assert out.dtype == jnp.bfloat16
    expected = layers.layer_norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out.astype(jnp.float32), expected.astype(jnp.float32))


def test_modulate_by_hand():
    x = jnp.array([[[1.0, 2.0], [3.0, 4.0]]])
    out = layers.modulate(x, shift=jnp.array([[10.0, 20.0]]), scale=jnp.array([[1.0, -1.0]]))
    np.testing.assert_array_equal(out, [[[12, 20], [16, 20]]])


def test_heads_split_and_merge_like_a_dense_layer():
    x = jax.random.normal(jax.random.key(0), (2, 5, 12))
    split = layers.HeadProjection(3)
    variables = split.init(jax.random.key(1), x)
    kernel = variables["params"]["linear"]["kernel"]
    assert kernel.shape == (12, 3, 4)
    heads = split.apply(variables, x)
    np.testing.assert_allclose(heads.reshape(2, 5, 12), x @ kernel.reshape(12, 12), atol=1e-5)
    merge = layers.HeadMerge()
    variables = merge.init(jax.random.key(2), heads)
    kernel = variables["params"]["linear"]["kernel"].reshape(12, 12)
    np.testing.assert_allclose(
        merge.apply(variables, heads), heads.reshape(2, 5, 12) @ kernel, atol=1e-5
    )


def test_head_projection_without_bias():
    x = jnp.zeros((1, 1, 4))
    params = layers.HeadProjection(2, use_bias=False).init(jax.random.key(0), x)["params"]
    assert set(params["linear"]) == {"kernel"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_adagn_by_hand(dtype):
    """AdaGN equals y_s GroupNorm(h) + y_b (arXiv:2105.05233, Sec. 3) in numpy."""
    rng = np.random.default_rng(0)
    h, emb = rng.normal(3, 2, (2, 3, 5, 8)), rng.normal(size=(2, 7))
    layer = layers.AdaGN(groups=4, epsilon=1e-3, dtype=dtype)
    params = layer.init(jax.random.key(0), h, emb)["params"]
    assert jax.tree.map(jnp.shape, params) == {"projection": {"kernel": (7, 16), "bias": (16,)}}
    np.testing.assert_array_equal(params["projection"]["bias"], [1] * 8 + [0] * 8)  # y_s, y_b
    kernel, bias = rng.normal(size=(7, 16)), rng.normal(size=16)
    out = layer.apply({"params": {"projection": {"kernel": kernel, "bias": bias}}},
                      jnp.asarray(h, dtype), jnp.asarray(emb, dtype))  # fmt: skip
    assert out.dtype == dtype
    groups = h.reshape(2, 15, 4, 2)  # two adjacent channels each
    mean, variance = (getattr(groups, f)((1, 3), keepdims=True) for f in ("mean", "var"))
    normed = ((groups - mean) / np.sqrt(variance + 1e-3)).reshape(h.shape)
    scale, shift = np.split(emb @ kernel + bias, 2, axis=1)
    expected = scale[:, None, None] * normed + shift[:, None, None]
    tolerance = 1e-4 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=tolerance, rtol=tolerance)


def test_adagn_starts_near_the_plain_norm():
    h = np.random.default_rng(0).normal(3, 2, (1, 4, 4, 8)).astype(np.float32)
    layer = layers.AdaGN(groups=2)
    params = layer.init(jax.random.key(0), h, np.zeros((1, 6), np.float32))
    out = layer.apply(params, h, np.zeros((1, 6), np.float32))  # y_s = 1 and y_b = 0
    whole = h.reshape(1, 16, 2, 4)
    normed = (whole - whole.mean((1, 3), keepdims=True)) / whole.std((1, 3), keepdims=True)
    np.testing.assert_allclose(out, normed.reshape(h.shape), atol=1e-3)
