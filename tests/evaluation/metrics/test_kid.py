"""KID: unbiased discrepancy over the subsets of torch-fidelity."""

import itertools

import numpy as np
import pytest

from condiff_jax.evaluation.metrics.kid import SEED, SIZE, SUBSETS, kid


def features(n, seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1, (n, 5)).astype(np.float32)


def by_pairs(x, y):
    """Compute the discrepancy with explicit sums over pairs."""

    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    x, y, n = x.astype(np.float64), y.astype(np.float64), len(x)
    within = [kernel(s[i], s[j]) for s in (x, y) for i, j in itertools.permutations(range(n), 2)]
    between = [kernel(a, b) for a, b in itertools.product(x, y)]
    return sum(within) / (n * (n - 1)) - 2 * sum(between) / n**2


def test_equals_sums_over_pairs_of_the_same_subsets():
    x, y, rng = features(12, 0), features(15, 1, 0.5), np.random.RandomState(7)
    values = []
    for _ in range(3):
        rows = rng.choice(12, 6, replace=False), rng.choice(15, 6, replace=False)
        values.append(by_pairs(x[rows[0]], y[rows[1]]))
    expected = {"kid": np.mean(values), "kid_std": np.std(values)}
    assert kid(x, y, subsets=3, size=6, seed=7) == pytest.approx(expected, rel=1e-11)


def test_numbers_of_torch_fidelity():
    # kid_features_to_metric of torch-fidelity 0.4.0 with its default seed.
    values = kid(features(60, 0), features(50, 1, 0.5), subsets=10, size=40)
    assert values == pytest.approx({"kid": 0.92855024, "kid_std": 0.26888662}, rel=1e-4)
    assert (SUBSETS, SIZE, SEED) == (100, 1000, 2020)


def test_is_unbiased():
    values = [
        kid(features(40, i), features(40, 1000 + i), subsets=1, size=40)["kid"] for i in range(100)
    ]
    assert abs(np.mean(values)) < 3 * np.std(values) / 10
    assert min(values) < 0


def test_bad_input():
    for n, m in ((5, 9), (9, 5)):
        with pytest.raises(ValueError, match=f"a subset has, 6, or more; got {n} and {m}"):
            kid(features(n, 0), features(m, 1), size=6)
    with pytest.raises(ValueError, match="a subset has"):
        kid(features(3, 0), features(3, 0), size=1)
    with pytest.raises(ValueError, match="features must be"):
        kid(features(6, 0)[:, :4], features(6, 1), size=6)
    with pytest.raises(ValueError, match="NaN"):
        kid(features(6, 0) + np.nan, features(6, 1), size=6)
