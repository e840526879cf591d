"""Dropping of semantics and control in training, for guidance by Eq. 2."""

import jax
import numpy as np
import pytest

from condiff_jax.conditioning.dropout import drop_flags

N = 100_000


def flags(*probabilities, seed=0, n=N):
    return map(np.asarray, drop_flags(jax.random.key(seed), n, *probabilities))


@pytest.mark.parametrize("probabilities", [(), (0.3, 0.2), (0.1, 0.6)])
def test_rates(probabilities):
    p_s, p_c = probabilities or (0.1, 0.1)  # the defaults are the paper's
    semantics, control = flags(*probabilities)
    assert semantics.shape == control.shape == (N,)
    assert semantics.dtype == control.dtype == bool
    for measured, p in [
        (semantics.mean(), p_s),
        ((control & ~semantics).mean(), p_c * (1 - p_s)),
        (control.mean(), p_s + p_c * (1 - p_s)),
    ]:
        assert abs(measured - p) < 4.5 * np.sqrt(p * (1 - p) / N)


def test_control_is_dropped_with_semantics():
    semantics, control = flags(0.5, 0.0)
    np.testing.assert_array_equal(semantics, control)


def test_independent_dropping_is_independent():
    semantics, control = flags(0.3, 0.2, "independent")
    for measured, p in [
        (semantics.mean(), 0.3),
        (control.mean(), 0.2),
        ((semantics & control).mean(), 0.06),
    ]:
        assert abs(measured - p) < 4.5 * np.sqrt(p * (1 - p) / N)
    with pytest.raises(ValueError, match="'both', choose from nested, independent"):
        drop_flags(jax.random.key(0), 4, 0.1, 0.1, "both")


@pytest.mark.parametrize("p_s", [0.0, 1.0])
@pytest.mark.parametrize("p_c", [0.0, 1.0])
def test_limits(p_s, p_c):
    semantics, control = flags(p_s, p_c, n=100)
    assert (semantics == bool(p_s)).all()
    assert (control == bool(p_s or p_c)).all()


def test_flags_depend_on_the_key():
    first, again, other = (np.stack([*flags(0.5, 0.5, seed=s, n=64)]) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(1).all()
