"""Control conditioning (Eq. 1): weighting, choice and embedding of the scalars."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.conditioning.cond import Control
from condiff_jax.conditioning.control import ControlEmbed, ControlSpec, Weighting, sinusoid
from condiff_jax.diffusion.schedule import scaled_linear

SIGMA = scaled_linear().sigma
ALL = np.arange(1000)


def weighting(kind, alpha=8.0, k=1.0, sigma=SIGMA):
    return Weighting.create(kind, alpha=alpha, k=k, sigma=sigma)


def test_sinusoid_closed_form():
    # The four frequencies 10000^(-i/4) are 1, 0.1, 0.01 and 0.001.
    x, frequencies = np.array([0.0, 2.0, 700.0]), np.array([1, 0.1, 0.01, 0.001])
    angles = x[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(sinusoid(x, 8), expected, atol=1e-4)
    np.testing.assert_allclose(
        sinusoid(jnp.asarray(2), 4, max_period=100.0),
        [np.cos(2), np.cos(0.2), np.sin(2), np.sin(0.2)],
        atol=1e-6,
    )


@pytest.mark.parametrize("alpha", [1.0, 2.0, 4.0, 8.0])
def test_cosine_is_one_when_clean_and_zero_at_noise(alpha):
    gamma = weighting("cosine", alpha)(jnp.array([0, 500, 1000]))
    np.testing.assert_allclose(gamma, [1, 0.5 ** (alpha / 2), 0], atol=1e-6)
    thirds = weighting("cosine", alpha, sigma=SIGMA[:3])(jnp.array([0, 1, 2]))
    np.testing.assert_allclose(thirds, [1, 0.75 ** (alpha / 2), 0.25 ** (alpha / 2)], atol=1e-6)


def test_linear_uniform_and_zero():
    t = jnp.array([0, 250, 1000])
    np.testing.assert_allclose(weighting("linear")(t), [1, 0.75, 0], atol=1e-6)
    np.testing.assert_array_equal(weighting("uniform")(t), [1, 1, 1])
    np.testing.assert_array_equal(weighting("zero")(t), [0, 0, 0])


@pytest.mark.parametrize("k", [1.0, 2.0, 6.0])
def test_step_is_one_up_to_noise_level_k(k):
    gamma = np.asarray(weighting("step", k=k)(ALL))
    np.testing.assert_array_equal(gamma, k >= SIGMA)
    assert 0 < gamma.sum() < 1000
    np.testing.assert_array_equal(gamma[[0, -1]], [1, 0])


@pytest.mark.parametrize(
    "k, expected", [(0.1, [0, 0, 0]), (0.5, [1, 0, 0]), (1.5, [1, 1, 0]), (9, [1, 1, 1])]
)
def test_step_includes_its_bound(k, expected):
    gamma = weighting("step", k=k, sigma=np.array([0.5, 1.0, 2.0]))
    np.testing.assert_array_equal(gamma(jnp.arange(3)), expected)


@pytest.mark.parametrize("kind", ["cosine", "linear", "step", "uniform", "zero"])
def test_weighting_never_grows_with_noise(kind):
    gamma = np.asarray(weighting(kind)(jnp.asarray(ALL)))
    assert gamma.shape == (1000,)
    assert (np.diff(gamma) <= 1e-7).all()
    assert (gamma >= 0).all() and (gamma <= 1).all()


SCALARS = {
    "crop_top": np.array([0.1, 0.2]),
    "crop_left": np.array([0.3, 0.4]),
    "crop_height": np.array([0.5, 0.6]),
    "crop_width": np.array([0.7, 0.8]),
    "flip": np.array([0.0, 1.0]),
    "aspect": np.array([1.5, 2.5]),
    "height": np.array([480.0, 240.0]),
    "width": np.array([640.0, 320.0]),
}
CROP, SIZE = [[100, 300, 500, 700], [200, 400, 600, 800]], [[480, 640], [240, 320]]


@pytest.mark.parametrize(
    "groups, high, low",
    [
        (("size", "aspect", "flip", "crop"), [[*CROP[0], 0, 1500], [*CROP[1], 1000, 2500]], SIZE),
        (("crop", "flip"), [[*CROP[0], 0], [*CROP[1], 1000]], np.zeros((2, 0))),
        (("aspect",), [[1500], [2500]], np.zeros((2, 0))),
        (("size",), np.zeros((2, 0)), SIZE),
    ],
)
def test_spec_picks_and_scales_scalars_in_order(groups, high, low):
    control = ControlSpec(groups).control(SCALARS)
    np.testing.assert_allclose(control.high, high, rtol=1e-6)
    np.testing.assert_allclose(control.low, low, rtol=1e-6)


def test_spec_names_and_empty_spec():
    spec = ControlSpec(("size", "flip", "crop"))
    assert spec.high == ("crop_top", "crop_left", "crop_height", "crop_width", "flip")
    assert spec.low == ("height", "width")
    assert ControlSpec(()).control(SCALARS) is None


CONTROL = Control(high=jnp.array([[0.5, 2.0]] * 3), low=jnp.array([[7.0]] * 3))
T = jnp.array([0, 500, 500])
KEEP = jnp.zeros(3, bool)


def silu(x):
    return x / (1 + np.exp(-x))


def simple_params():
    """E_h = (2 silu(cos h_0) + 0.5, 3 silu(sin h_1) - 1), E_l = (silu(cos l_0), 4 + silu(1))."""
    high = np.zeros((512, 2), np.float32)
    high[0, 0] = 1  # cosine of the first scalar at frequency 1
    high[256 + 128, 1] = 1  # sine of the second scalar at frequency 1
    low = np.zeros((256, 2), np.float32)
    low[0, 0] = 1
    diagonal = lambda *d: np.diag(np.asarray(d, np.float32))  # noqa: E731
    return {
        "high": {
            "fc1": {"kernel": high, "bias": np.zeros(2, np.float32)},
            "fc2": {"kernel": diagonal(2, 3), "bias": np.array([0.5, -1], np.float32)},
        },
        "low": {
            "fc1": {"kernel": low, "bias": np.array([0, 1], np.float32)},
            "fc2": {"kernel": diagonal(1, 1), "bias": np.array([0, 4], np.float32)},
        },
    }


E_HIGH = np.array([2 * silu(np.cos(0.5)) + 0.5, 3 * silu(np.sin(2)) - 1])
E_LOW = np.array([silu(np.cos(7)), 4 + silu(1)])


@pytest.mark.parametrize(
    "kind, gamma",
    [("cosine", [1, 0.5, 0.5]), ("linear", [1, 0.5, 0.5]), ("uniform", [1, 1, 1]),
     ("zero", [0, 0, 0]), ("step", [1, 0, 0])],
)  # fmt: skip
def test_embedding_by_hand(kind, gamma):
    embed = ControlEmbed(2, weighting(kind, alpha=2.0))
    c_emb = embed.apply({"params": simple_params()}, CONTROL, T, KEEP)
    np.testing.assert_allclose(c_emb, E_HIGH + np.outer(gamma, E_LOW), atol=1e-5)


@pytest.mark.parametrize("group", ["high", "low"])
def test_embedding_of_one_group(group):
    empty = jnp.zeros((3, 0))
    control = CONTROL.replace(**{"low" if group == "high" else "high": empty})
    params = {group: simple_params()[group]}  # an empty group has no parameters
    c_emb = ControlEmbed(2, weighting("linear")).apply({"params": params}, control, T, KEEP)
    expected = np.outer([1, 1, 1], E_HIGH) if group == "high" else np.outer([1, 0.5, 0.5], E_LOW)
    np.testing.assert_allclose(c_emb, expected, atol=1e-5)


def test_dropped_control_is_exactly_zero():
    embed = ControlEmbed(2, weighting("linear"))
    drop = jnp.array([False, True, False])
    c_emb = np.asarray(embed.apply({"params": simple_params()}, CONTROL, T, drop))
    np.testing.assert_array_equal(c_emb[1], 0)
    np.testing.assert_allclose(c_emb[[0, 2]], E_HIGH + np.outer([1, 0.5], E_LOW), atol=1e-5)


def test_control_has_no_effect_at_initialization():
    embed = ControlEmbed(4, weighting("uniform"))
    c_emb, variables = embed.init_with_output(jax.random.key(0), CONTROL, T, KEEP)
    np.testing.assert_array_equal(c_emb, np.zeros((3, 4)))
    for name in ("high", "low"):  # only the last layer is zero, so that gradients are not
        assert np.abs(variables["params"][name]["fc1"]["kernel"]).max() > 0
