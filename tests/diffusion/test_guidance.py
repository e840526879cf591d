"""Dual guidance (Eq. 2), classifier-free guidance as its limit, and their scale (Eq. 4)."""

import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.conditioning.cond import Cond, Control
from condiff_jax.diffusion.guidance import (
    classifier_free_guidance,
    dual_guidance,
    scaled_guidance,
)

X = np.array([[1.0, -2.0], [3.0, 0.5], [0.0, 7.0]], np.float32)
T = np.array([10, 20, 30])
COND = Cond.of(jnp.array([5, 6, 7]), Control(high=jnp.arange(3.0)[:, None], low=jnp.ones((3, 2))))


def eps(x, label, high, drop_semantics, drop_control):
    """Return a different value for each branch."""
    semantics = 0.0 if drop_semantics else 100.0 * label
    control = 0.0 if drop_control else 10.0 + high
    return x**2 + semantics + control


class Denoiser:
    """Denoiser that records its calls."""

    def __init__(self, dtype=jnp.float32):
        self.calls, self.dtype = [], dtype

    def __call__(self, x, t, cond):
        self.calls.append((x, t, cond))
        rows = zip(
            x, cond.semantics, cond.control.high[:, 0], cond.drop_semantics, cond.drop_control,
            strict=True,
        )  # fmt: skip
        return jnp.stack([eps(*row) for row in rows]).astype(self.dtype)


def branch(drop_semantics, drop_control):
    rows = zip(X, [5, 6, 7], [0.0, 1.0, 2.0], strict=True)
    return np.stack([eps(*row, drop_semantics, drop_control) for row in rows])


FULL, NO_CONTROL, NULL = branch(False, False), branch(False, True), branch(True, True)


@pytest.mark.parametrize(
    "scale, control_scale, flags",
    [
        (3.0, 1.375, [(0, 0), (0, 1), (1, 1)]),
        (3.0, 1.0, [(0, 0), (1, 1)]),
        (1.0, 1.375, [(0, 0), (0, 1)]),
        (1.0, 1.0, [(0, 0)]),
        (2.0, 0.0, [(0, 1), (1, 1)]),
        (0.0, 1.0, [(1, 1)]),
    ],
)
def test_eq_2_in_one_call_of_the_branches_it_needs(scale, control_scale, flags):
    denoise = Denoiser()
    out = dual_guidance(denoise, scale, control_scale)(X, T, COND)
    combined = scale * (control_scale * FULL + (1 - control_scale) * NO_CONTROL)
    np.testing.assert_allclose(out, combined + (1 - scale) * NULL, rtol=1e-5)

    ((x, t, cond),) = denoise.calls
    n = len(flags)  # the copies of an image are adjacent
    np.testing.assert_array_equal(x, np.repeat(X, n, 0))
    np.testing.assert_array_equal(t, np.repeat(T, n))
    np.testing.assert_array_equal(cond.semantics, np.repeat([5, 6, 7], n))
    np.testing.assert_array_equal(cond.control.high[:, 0], np.repeat([0, 1, 2], n))
    np.testing.assert_array_equal(cond.control.low, np.ones((3 * n, 2)))
    np.testing.assert_array_equal(cond.drop_semantics, [s for s, _ in flags] * 3)
    np.testing.assert_array_equal(cond.drop_control, [c for _, c in flags] * 3)


def test_eq_2_by_hand():
    # Image 2 has x^2 = (0, 49), label 7 and high 2: the branches are 712, 700 and 0, plus x^2.
    out = dual_guidance(Denoiser(), 2.0, 1.5)(X, T, COND)
    np.testing.assert_allclose(out[2], [2 * (1.5 * 712 - 0.5 * 700), 1436 + 49], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1.5, 5.0])
def test_classifier_free_guidance_is_the_limit_of_beta_1(scale):
    out = classifier_free_guidance(Denoiser(), scale)(X, T, COND)
    np.testing.assert_allclose(out, scale * FULL + (1 - scale) * NULL, rtol=1e-6)
    np.testing.assert_array_equal(out, dual_guidance(Denoiser(), scale, 1.0)(X, T, COND))


def test_both_scales_1_is_the_conditional_prediction():
    np.testing.assert_array_equal(dual_guidance(Denoiser())(X, T, COND), FULL)


def test_drop_flags_of_the_condition_are_preserved():
    denoise = Denoiser()
    cond = COND.replace(
        drop_semantics=jnp.array([True, False, False]), drop_control=jnp.array([True, True, False])
    )
    out = dual_guidance(denoise, 3.0, 1.375)(X, T, cond)
    _, _, called = denoise.calls[0]
    np.testing.assert_array_equal(called.drop_semantics, [1, 1, 1, 0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(called.drop_control, [1, 1, 1, 1, 1, 1, 0, 1, 1])
    np.testing.assert_allclose(out[0], NULL[0], rtol=1e-5)
    np.testing.assert_allclose(out[1], 3 * NO_CONTROL[1] - 2 * NULL[1], rtol=1e-5)


def test_models_without_control():
    def denoise(x, t, cond):
        assert cond.control is None
        return jnp.where(cond.drop_semantics, 0.0, cond.semantics)[:, None] * jnp.ones_like(x)

    out = dual_guidance(denoise, 3.0)(X, T, Cond.of(jnp.array([5, 6, 7])))
    np.testing.assert_allclose(out, 3.0 * np.array([[5, 5], [6, 6], [7, 7]]), rtol=1e-6)


def test_branches_are_combined_in_f32():
    out = dual_guidance(Denoiser(jnp.bfloat16), 1.5)(X, T, COND)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (FULL, NULL)]
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1.5 * rounded[0] - 0.5 * rounded[1], rtol=1e-6)


@pytest.mark.parametrize(
    "scale, upsampling, expected", [(1.5, 2.0, 2.0), (1.5, 1.0, 1.5), (1.0, 4.0, 1.0), (4, 2, 7)]
)
def test_eq_4(scale, upsampling, expected):
    assert scaled_guidance(scale, upsampling) == expected
