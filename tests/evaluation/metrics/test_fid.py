"""FID: known distributions, files of statistics, rank deficiency, and invalid comparisons."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg

from condiff_jax.evaluation.metrics import fid
from condiff_jax.evaluation.metrics.fid import Statistics
from tests.evaluation.metrics.test_features import means, random_images


def statistics(dimensions=4, **about):
    factor = np.random.default_rng(0).standard_normal((dimensions, 9))
    return Statistics(np.arange(dimensions, dtype=np.float64), factor @ factor.T, **about)


def test_streaming_equals_the_whole_and_describes_images_and_network():
    images, parts = random_images(9), []
    measured = fid.measure(means(), np.split(images, [2, 3]), parts)
    features = images.mean((1, 2))
    np.testing.assert_allclose(np.concatenate(parts), features, rtol=1e-5)
    np.testing.assert_allclose(measured.mean, features.mean(0), rtol=1e-5)
    np.testing.assert_allclose(measured.covariance, np.cov(features, rowvar=False), rtol=1e-4)
    assert (measured.count, measured.network, measured.resolution) == (9, "means", (4, 5))
    assert measured.sha256 == "1" * 64


def test_equals_the_matrix_square_root():
    first, second = random_images(50), random_images(60, seed=1) // 2
    generated, reference = (fid.measure(means(), [images]) for images in (first, second))
    a, b = (np.cov(images.mean((1, 2)), rowvar=False) for images in (first, second))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = np.square(first.mean((0, 1, 2)) - second.mean((0, 1, 2))).sum()
    expected += np.trace(a + b - 2 * root)
    values = fid.fid(generated, reference)
    assert values == {"fid": pytest.approx(expected, rel=1e-4), "fid_rank_deficient": False}


@pytest.mark.parametrize(
    "counts, deficient",
    [((5, 5), False), ((4, 5), True), ((9, 2), True), ((None, 5), None), ((None, 4), True)],
)
def test_too_few_images_are_marked(counts, deficient):
    first, second = (statistics(count=n) for n in counts)
    for pair in ((first, second), (second, first)):
        assert fid.fid(*pair)["fid_rank_deficient"] is deficient


def test_fewer_than_two_images():
    for batches in ([], [random_images(1)]):
        with pytest.raises(ValueError, match="2 samples or more, got"):
            fid.measure(means(), batches)


def test_mixed_sizes():
    with pytest.raises(ValueError, match=r"mixed sizes: \(4, 5\) and \(4, 6\)"):
        fid.measure(means(), [random_images(2), random_images(2, 4, 6)])


def test_saved_statistics_are_the_same_and_readable_by_other_programs(tmp_path):
    path = str(tmp_path / "reference.npz")
    for fields in (
        {},
        dict(count=7, network="means", sha256="1" * 64, resolution=(4, 5), reference="2" * 64)
        | dict(resize="clean"),
    ):
        saved = statistics(**fields)
        saved.save(path)
        loaded = fid.load(path)
        for field in dataclasses.fields(Statistics):
            np.testing.assert_array_equal(getattr(loaded, field.name), getattr(saved, field.name))
        with np.load(path) as arrays:  # without pickles, as pytorch-fid and clean-fid do
            assert arrays["mu"].dtype == arrays["sigma"].dtype == np.float64
            np.testing.assert_array_equal(arrays["mu"], saved.mean)
            np.testing.assert_array_equal(arrays["sigma"], saved.covariance)


def test_files_of_other_programs(tmp_path):
    path, expected = str(tmp_path / "reference.npz"), statistics()
    common = dict(mu=expected.mean.astype(np.float32), sigma=expected.covariance)
    adm = dict(mu_s=np.zeros(2), sigma_s=np.eye(2), arr_0=random_images(3))
    for arrays in (common, common | adm):
        np.savez(path, **arrays)
        loaded = fid.load(path)
        np.testing.assert_array_equal(loaded.mean, expected.mean)
        np.testing.assert_array_equal(loaded.covariance, expected.covariance)
        assert loaded.mean.dtype == np.float64
        assert loaded.count is loaded.sha256 is loaded.resolution is None
        assert loaded.rank_deficient is None
    np.savez(path, **common, resolution=256, count=[20, 30])  # of other shapes than our fields
    assert fid.load(path).resolution is fid.load(path).count is None
    features = np.random.default_rng(0).standard_normal((20, 4))
    np.savez(path, feats=features)
    loaded = fid.load(path)
    np.testing.assert_allclose(loaded.covariance, np.cov(features, rowvar=False))
    assert loaded.count == 20 and not loaded.rank_deficient
    np.savez(path, **common, feats=features)
    np.testing.assert_array_equal(fid.load(path).covariance, expected.covariance)


@pytest.mark.parametrize(
    "arrays, message",
    [
        (dict(arr_0=np.zeros((2, 4, 4, 3))), "neither mu and sigma nor feats, but arr_0"),
        (dict(mu=np.zeros(3)), "neither mu and sigma"),
        (dict(mu=np.zeros(3), sigma=np.eye(2)), "do not fit"),
        (dict(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "NaN"),
        (dict(feats=np.zeros((1, 2))), "2 samples or more"),
        (dict(mu=np.array([{}], object), sigma=np.eye(1)), "cannot be read"),  # a pickle
    ],
)
def test_files_without_statistics(tmp_path, arrays, message):
    path = tmp_path / "reference.npz"
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"reference.npz.*{message}") as error:
        fid.load(str(path))
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.npz does not exist"):
        fid.load(str(tmp_path / "none.npz"))
    (tmp_path / "broken.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="broken.npz cannot be read"):
        fid.load(str(tmp_path / "broken.npz"))


def test_statistics_that_do_not_compare():
    generated = statistics(sha256="1" * 64, network="means", resolution=(4, 5))
    references = {
        "another network": statistics(5),
        "of deeper with sha256 222222222222, not of means with 1111": dataclasses.replace(
            generated, sha256="2" * 64, network="deeper"
        ),
        "images of 8 x 8 pixels, not 4 x 5": dataclasses.replace(generated, resolution=(8, 8)),
    }
    for message, reference in references.items():
        with pytest.raises(ValueError, match=message):
            fid.fid(generated, reference)
    # Fields of the reference that are not known are not compared.
    assert fid.fid(generated, statistics())["fid"] == pytest.approx(0, abs=1e-6)
