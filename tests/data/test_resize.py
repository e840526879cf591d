"""Tests that resizing matches Pillow's antialiased bicubic, without shifts of subpixels."""

import numpy as np
import pytest
from PIL import Image

from condiff_jax.data.resize import resize

SHAPES = [(256, 64), (97, 64), (64, 64), (61, 64), (40, 64), (85, 64), (140, 64), (900, 64)]


def photo(size, seed=0):
    """Noise whose amplitude is one over the frequency, like that of photographs."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1 / size
    waves = np.fft.rfft2(rng.normal(size=(3, size, size))) / frequency
    field = np.fft.irfft2(waves, s=(size, size))
    return np.clip(np.moveaxis(128 + 45 * field / field.std(), 0, -1), 0, 255).astype(np.uint8)


def pillow(pixels, size, box=None, kernel=Image.Resampling.BICUBIC):
    return np.asarray(Image.fromarray(pixels).resize((size, size), kernel, box)).astype(float)


def rms(difference):
    return np.sqrt(np.mean(np.square(difference)))


@pytest.mark.parametrize(("side", "size"), SHAPES)
def test_it_is_closer_to_pillows_bicubic_than_other_good_filters_are(side, size):
    pixels = photo(side)
    expected = pillow(pixels, size)
    error = rms(resize(pixels, (0, 0, side), size) - expected)
    assert error < 2.4  # of 255; the images' standard deviation is 45
    for kernel in (Image.Resampling.LANCZOS, Image.Resampling.HAMMING, Image.Resampling.BILINEAR):
        assert error <= 2 / 3 * rms(pillow(pixels, size, kernel=kernel) - expected)


@pytest.mark.parametrize("box", [(0.5, 0.25, 130.5), (3.75, 0, 101.25), (7.125, 2.5, 150.125)])
def test_windows_begin_and_end_between_pixels(box):
    left, top, side = box
    pixels = photo(170)
    expected = pillow(pixels, 64, (left, top, left + side, top + side))
    error = resize(pixels, box, 64) - expected
    assert rms(error[2:-2, 2:-2]) < 1.4  # near the border, Pillow uses pixels outside the box


@pytest.mark.parametrize(("side", "size"), SHAPES)
def test_constants_are_kept_and_mirroring_commutes(side, size):
    flat = np.full((side, side, 3), (0, 137, 255), np.uint8)
    np.testing.assert_array_equal(resize(flat, (0, 0, side), size)[0, 0], (0, 137, 255))
    assert np.ptp(resize(flat, (0, 0, side), size), (0, 1)).max() == 0
    pixels = photo(side)
    expected = resize(pixels, (0, 0, side), size)[:, ::-1].astype(int)
    difference = resize(pixels[:, ::-1], (0, 0, side), size) - expected
    # Where blocks are averaged first, the last ones have fewer pixels, so mirroring is not exact.
    if side < 6 * size:
        assert np.abs(difference).max() <= 1


@pytest.mark.parametrize(("side", "size"), SHAPES)
def test_waves_finer_than_the_output_are_suppressed(side, size):
    """Frequencies above the output's Nyquist limit are removed rather than aliased."""
    if side < 1.4 * size:
        return
    columns = np.arange(side)
    for cycles in (0.8, 0.9, 1):  # per output pixel
        wave = np.cos(2 * np.pi * columns * min(cycles * size / side, 0.5))
        stripes = np.broadcast_to((128 + 100 * wave)[None, :, None], (side, side, 3))
        out = resize(stripes.astype(np.uint8), (0, 0, side), size)[2:-2, 2:-2]
        assert out.std() < 0.16 * 100 / np.sqrt(2)
    wave = np.cos(2 * np.pi * columns * 0.2 * size / side)  # five output pixels long: kept
    stripes = np.broadcast_to((128 + 100 * wave)[None, :, None], (side, side, 3))
    assert resize(stripes.astype(np.uint8), (0, 0, side), size).std() > 0.85 * 100 / np.sqrt(2)


@pytest.mark.parametrize("size", [24, 48, 63, 100, 200])
@pytest.mark.parametrize("box", [(0, 0, 100), (0.5, 0.75, 98.5), (1.25, 0.125, 97)])
def test_the_centroid_is_not_shifted(size, box):
    """The centroid of a blob in the center of a box is in the center of the result."""
    left, top, side = box
    if size > side and (left or top):
        return  # only reduced decodes of JPEGs have such boxes, and they are never upsampled
    rows, columns = np.mgrid[:101, :101] + 0.5
    center = [edge + side / 2 for edge in (top, left)]
    blob = 40 + 200 * np.exp(-((rows - center[0]) ** 2 + (columns - center[1]) ** 2) / (2 * 9**2))
    pixels = np.repeat(np.round(blob).astype(np.uint8)[..., None], 3, -1)
    out = resize(pixels, box, size)[..., 1].astype(float) - 40
    offsets = np.arange(size) + 0.5 - size / 2
    for axis in (0, 1):
        centroid = (out.sum(1 - axis) * offsets).sum() / out.sum()
        assert abs(centroid) < 0.02


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("side", [1, 2, 3, 50])
def test_any_size_from_any_size(side, size):
    out = resize(photo(side), (0, 0, side), size)
    assert out.shape == (size, size, 3) and out.dtype == np.uint8
    if side == size:
        np.testing.assert_array_equal(out, photo(side))


def test_pixels_outside_the_box_do_not_matter():
    pixels = photo(80)
    for size in (16, 32, 48, 60, 64):
        other = pixels.copy()
        other[:5] = other[:, :9] = other[65:] = other[:, 69:] = 255 - pixels[0, 0]
        box = (9, 5, 60)
        np.testing.assert_array_equal(resize(other, box, size), resize(pixels, box, size))
