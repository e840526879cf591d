"""clean-fid's resizing: Pillow's of single channels in f32, clipped once; and FID knows of it."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from condiff_jax.evaluation.feature_networks import resized
from condiff_jax.evaluation.metrics import clean, fid
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.models import inception


def pictures(height, width):
    """Two of full contrast, that bicubic overshoots, with a smooth part."""
    rng = np.random.default_rng(height)
    images = rng.choice([0, 90, 255], (2, height, width, 3)).astype(np.uint8)
    images[0, :, width // 2 :] = np.linspace(0, 255, height).astype(np.uint8)[:, None, None]
    return images


def pillow(images):
    """What clean-fid computes, before it clips."""
    side = (inception.SIDE, inception.SIDE)
    planes = np.moveaxis(images.astype(np.float32), 3, 1)
    found = [
        [np.asarray(Image.fromarray(plane).resize(side, Image.Resampling.BICUBIC)) for plane in one]
        for one in planes
    ]
    return np.moveaxis(np.array(found), 1, 3)


@pytest.mark.parametrize("height, width", [(32, 32), (512, 512), (299, 299), (64, 400), (1, 7)])
def test_equals_pillow_in_floats_clipped(height, width):
    images = pictures(height, width)
    raw = pillow(images)
    found = np.asarray(clean.resize(images))
    assert found.shape == (2, 299, 299, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found, raw.clip(0, 255), atol=1e-3)
    if (height, width) == (32, 32):
        assert raw.min() < -1 and raw.max() > 256  # so the clipping is seen
        assert np.abs(found - found.round()).max() > 0.4  # and that nothing is rounded


def test_is_not_what_fids_network_does_itself():
    for side in (32, 512):
        images = pictures(side, side)
        difference = np.abs(clean.resize(images) - inception.resize(images))
        assert difference.mean() > 1


def test_a_network_is_another_one_with_it():
    """Its statistics are kept under another key, recorded, and not compared with the others."""
    tf = FeatureNetwork("Inception", "1" * 64, 3, {}, None, prepare=inception.resize)
    other = resized(tf, "clean")
    assert resized(tf, "tf") is tf and resized(tf, "clean") is other  # compiled once
    assert other.sha256 == tf.sha256 and other.identity != tf.identity
    assert (tf.resize, other.resize) == ("", "clean")
    images = pictures(32, 32)
    np.testing.assert_array_equal(other.prepare(images), clean.resize(images))
    with pytest.raises(KeyError, match="lanczos"):
        resized(tf, "lanczos")


def test_statistics_say_it_and_do_not_mix(tmp_path):
    common = dict(network="Inception", sha256="1" * 64, count=9)
    made = {
        how: fid.Statistics(np.zeros(3), np.eye(3), **common, resize=how) for how in ("", "clean")
    }
    path = str(tmp_path / "x.npz")
    for how, statistics in made.items():
        statistics.save(path)
        assert fid.load(path).resize == how
        assert fid.fid(statistics, fid.load(path))["fid"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="evaluation.resize=clean, not tf"):
        fid.fid(made[""], made["clean"])
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))  # of another program, which does not say
    assert fid.load(path).resize is None
    assert fid.fid(made["clean"], fid.load(path))["fid"] == pytest.approx(0, abs=1e-6)
    older = dataclasses.replace(made[""], resize=None)  # ours, before there was a choice
    older.save(path)
    assert fid.load(path).resize == ""
