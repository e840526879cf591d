"""Resizing of clean-fid: Pillow's of single f32 channels, clipped once; recorded in statistics."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from condiff_jax.evaluation.feature_networks import resized
from condiff_jax.evaluation.metrics import clean, fid
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.models import inception


def contrast_images(height, width):
    """Return two images of full contrast, which bicubic overshoots, with a smooth part."""
    rng = np.random.default_rng(height)
    images = rng.choice([0, 90, 255], (2, height, width, 3)).astype(np.uint8)
    images[0, :, width // 2 :] = np.linspace(0, 255, height).astype(np.uint8)[:, None, None]
    return images


def pillow(images):
    """Resize as clean-fid does, before clipping."""
    size = (inception.SIDE, inception.SIDE)
    bicubic = Image.Resampling.BICUBIC
    planes = np.moveaxis(images.astype(np.float32), 3, 1)
    resized_planes = [
        [np.asarray(Image.fromarray(plane).resize(size, bicubic)) for plane in channels]
        for channels in planes
    ]
    return np.moveaxis(np.array(resized_planes), 1, 3)


@pytest.mark.parametrize("height, width", [(32, 32), (512, 512), (299, 299), (64, 400), (1, 7)])
def test_equals_pillow_in_floats_clipped(height, width):
    images = contrast_images(height, width)
    raw = pillow(images)
    output = np.asarray(clean.resize(images))
    assert output.shape == (2, 299, 299, 3) and output.dtype == np.float32
    np.testing.assert_allclose(output, raw.clip(0, 255), atol=1e-3)
    if (height, width) == (32, 32):
        assert raw.min() < -1 and raw.max() > 256  # clipping has an effect
        assert np.abs(output - output.round()).max() > 0.4  # nothing is rounded


def test_differs_from_the_resizing_of_fids_network():
    for side in (32, 512):
        images = contrast_images(side, side)
        difference = np.abs(clean.resize(images) - inception.resize(images))
        assert difference.mean() > 1


def test_a_network_with_clean_resizing_has_another_identity():
    """Its statistics are cached under another key, recorded, and not compared with others."""
    tf = FeatureNetwork("Inception", "1" * 64, 3, {}, None, prepare=inception.resize)
    other = resized(tf, "clean")
    assert resized(tf, "tf") is tf and resized(tf, "clean") is other  # compiled once
    assert other.sha256 == tf.sha256 and other.identity != tf.identity
    assert (tf.resize, other.resize) == ("", "clean")
    images = contrast_images(32, 32)
    np.testing.assert_array_equal(other.prepare(images), clean.resize(images))
    with pytest.raises(KeyError, match="lanczos"):
        resized(tf, "lanczos")


def test_statistics_contain_the_resizing_and_do_not_mix(tmp_path):
    common = dict(network="Inception", sha256="1" * 64, count=9)
    by_method = {
        method: fid.Statistics(np.zeros(3), np.eye(3), **common, resize=method)
        for method in ("", "clean")
    }
    path = str(tmp_path / "x.npz")
    for method, statistics in by_method.items():
        statistics.save(path)
        assert fid.load(path).resize == method
        assert fid.fid(statistics, fid.load(path))["fid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="evaluation.resize=clean, not tf"):
        fid.fid(by_method[""], by_method["clean"])
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))  # of another program, without the field
    assert fid.load(path).resize is None
    assert fid.fid(by_method["clean"], fid.load(path))["fid"] == pytest.approx(0, abs=1e-6)
    older = dataclasses.replace(by_method[""], resize=None)  # from before evaluation.resize
    older.save(path)
    assert fid.load(path).resize == ""
