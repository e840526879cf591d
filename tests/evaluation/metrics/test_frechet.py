"""The Frechet distance has its closed form, and moments do not depend on the batches."""

import numpy as np
import pytest
import scipy.linalg

from condiff_jax.evaluation.metrics.frechet import Moments, frechet_distance


def gaussian(dimensions, rank, seed):
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((dimensions, rank))
    return rng.standard_normal(dimensions), factor @ factor.T


def test_closed_form_of_diagonal_gaussians():
    std1, std2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    mean1, mean2 = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, -2.0])
    expected = np.square(mean1 - mean2).sum() + np.square(std1 - std2).sum()
    distance = frechet_distance(mean1, np.diag(std1**2), mean2, np.diag(std2**2))
    assert distance == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rank", [20, 5, 1])
def test_equals_the_matrix_square_root_and_is_symmetric(rank):
    first, second = gaussian(12, rank, 0), gaussian(12, 20, 1)
    distance = frechet_distance(*first, *second)
    assert distance == pytest.approx(frechet_distance(*second, *first), rel=1e-6)
    # scipy's root is unreliable for singular matrices; the added diagonal changes less than 1e-4.
    cov1 = first[1] + 1e-10 * np.eye(12)
    root = scipy.linalg.sqrtm(cov1 @ second[1]).real
    expected = np.square(first[0] - second[0]).sum() + np.trace(cov1 + second[1] - 2 * root)
    assert distance == pytest.approx(expected, rel=1e-4)


def test_rank_deficient_covariances_of_orthogonal_subspaces():
    mean = np.zeros(2)
    assert frechet_distance(mean, np.diag([4.0, 0]), mean, np.diag([0, 9.0])) == pytest.approx(13)


def test_zero_for_itself():
    for rank in (20, 3):
        mean, cov = gaussian(12, rank, 2)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-6


@pytest.mark.parametrize("offset", [0, 1e6])
def test_streaming_equals_the_whole(offset):
    features = np.random.default_rng(0).standard_normal((100, 5)) * np.arange(1, 6) + offset
    moments = Moments()
    for part in np.split(features, [1, 7, 64]):
        moments.add(part)
    mean, cov = moments.result()
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-7, atol=1e-7)


def test_bad_input():
    moments = Moments()
    with pytest.raises(ValueError, match="2 samples or more, got 0"):
        moments.result()
    moments.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="2 samples or more, got 1"):
        moments.result()
    with pytest.raises(ValueError, match="4 dimensions, not 3"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="NaN"):
        moments.add(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="must be"):
        moments.add(np.zeros((0, 3)))
    good = np.zeros(3), np.eye(3)
    with pytest.raises(ValueError, match="do not match"):
        frechet_distance(*good, np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="do not match"):
        frechet_distance(*good, np.zeros(3), np.eye(2))
    with pytest.raises(ValueError, match="NaN"):
        frechet_distance(*good, np.zeros(3), np.full((3, 3), np.inf))


def test_moments_of_f32_features_are_computed_in_f64():
    features = np.random.default_rng(0).normal(300, 1, (50, 4)).astype(np.float32)
    moments = Moments()
    for part in np.split(features, 5):
        moments.add(part)
    mean, covariance = moments.result()
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(features.astype(np.float64).T), rtol=1e-11)
