"""The metadata of a crop tells exactly which window of the picture was used."""

import numpy as np
import pytest
from PIL import Image

from condiff_jax.conditioning.control import View, scalar_names
from condiff_jax.data.augment import CROPS, augment, center, jitter
from condiff_jax.data.resize import resize


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def redo(image, scalars, resolution):
    """Applies the metadata to the picture by hand."""
    height, width = image.shape[:2]
    top, rows = round(scalars["crop_top"] * height), round(scalars["crop_height"] * height)
    left, cols = round(scalars["crop_left"] * width), round(scalars["crop_width"] * width)
    assert rows == cols and top + rows <= height and left + cols <= width
    window = image[top : top + rows, left : left + cols].copy()
    out = resize(window, (0, 0, rows), resolution)
    return out[:, :: -1 if scalars["flip"] else 1]


@pytest.mark.parametrize("size", [(64, 64), (37, 90), (203, 51), (1, 1), (2, 3), (500, 400)])
@pytest.mark.parametrize("crop", [*CROPS.values(), (1e-6, 1e-6), (1, 1)])
def test_metadata_reconstructs_the_output(size, crop):
    image, rng = picture(*size), np.random.default_rng(1)
    for _ in range(6):
        out, scalars = augment(image, rng, resolution=16, crop=crop)
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8
        assert tuple(scalars) == scalar_names(jitter=False)
        assert all(type(v) is np.float32 for v in scalars.values())
        np.testing.assert_array_equal(out, redo(image, scalars, 16))
        assert scalars["height"] == size[0] and scalars["width"] == size[1]
        assert scalars["aspect"] == np.float32(size[1] / size[0])


def test_flip_is_an_exact_mirror():
    image, flips = picture(40, 50), 0
    for seed in range(200):
        out, with_flip = augment(image, np.random.default_rng(seed), resolution=8)
        plain, without = augment(image, np.random.default_rng(seed), resolution=8, flip=False)
        assert without["flip"] == 0
        flips += with_flip["flip"]
        np.testing.assert_array_equal(out, plain[:, ::-1] if with_flip["flip"] else plain)
        assert {**with_flip, "flip": 0} == {**without, "flip": 0}
    assert 70 < flips < 130


@pytest.mark.parametrize("name", CROPS)
def test_crops_are_uniform_in_size_and_place(name):
    low, high = CROPS[name]
    image, rng = np.zeros((1000, 1500, 3), np.uint8), np.random.default_rng(2)
    draws = [augment(image, rng, resolution=1, crop=(low, high))[1] for _ in range(600)]
    f = np.array([d["crop_height"] for d in draws])
    assert low - 1e-3 <= f.min() and f.max() <= high + 1e-3
    place = np.array([d["crop_left"] / (1 - d["crop_width"]) for d in draws])
    for values in ((f - low) / (high - low), place):
        # Kolmogorov-Smirnov distance to the uniform law; 0.08 has a p-value under 1e-3.
        assert np.abs(np.sort(values) - np.linspace(0, 1, len(values))).max() < 0.08


def test_every_position_occurs():
    image, rng = picture(4, 6), np.random.default_rng(3)
    draws = [augment(image, rng, resolution=2, crop=(0.5, 0.5))[1] for _ in range(400)]
    assert {round(d["crop_top"] * 4) for d in draws} == {0, 1, 2}
    assert {round(d["crop_left"] * 6) for d in draws} == {0, 1, 2, 3, 4}


def test_same_seed_same_result_and_input_untouched():
    image = picture(30, 20)
    before = image.copy()
    a, b = (augment(image, np.random.default_rng(4), resolution=32) for _ in range(2))
    np.testing.assert_array_equal(a[0], b[0])
    assert a[1] == b[1]
    np.testing.assert_array_equal(image, before)


def test_downscaling_antialiases():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    whole = {"resolution": 8, "crop": (1, 1)}
    for out in (center(stripes, 8), augment(stripes, np.random.default_rng(0), **whole)[0]):
        assert abs(out.astype(int) - 127).max() < 20


@pytest.mark.parametrize("size", [(10, 10), (10, 17), (18, 11), (1, 5)])
def test_the_center_is_the_largest_square_in_the_middle(size):
    image, side = picture(*size), min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    window = Image.fromarray(image[top : top + side, left : left + side].copy())
    expected = window.resize((12, 12), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(center(image, 12), expected)


def test_side_is_rounded_to_the_nearest_pixel():
    for fraction, side in ((0.39, 4), (0.41, 4), (0.94, 9), (0.96, 10), (0.01, 1)):
        _, scalars = augment(
            picture(20, 10), np.random.default_rng(0), resolution=4, crop=(fraction, fraction)
        )
        assert scalars["crop_height"] == np.float32(side / 20)
        assert scalars["crop_width"] == np.float32(side / 10)


def test_center_at_native_size_is_the_picture():
    image = picture(16, 16)
    np.testing.assert_array_equal(center(image, 16), image)


@pytest.mark.parametrize("crop", [(0, 1), (0.5, 0.4), (0.9, 1.1), (float("nan"), 1)])
def test_bad_crop(crop):
    with pytest.raises(ValueError, match="crop="):
        augment(picture(4, 4), np.random.default_rng(0), resolution=4, crop=crop)


def test_bad_resolution_image_and_size():
    with pytest.raises(ValueError, match="resolution=0"):
        augment(picture(4, 4), np.random.default_rng(0), resolution=0)
    with pytest.raises(ValueError, match="resolution=-1"):
        center(picture(4, 4), -1)
    for bad in (picture(4, 4)[..., 0], picture(4, 4) / 255, picture(0, 4)):
        with pytest.raises(ValueError, match="image is"):
            center(bad, 4)


def test_colors_are_jittered_as_the_scalars_say():
    image, strength = picture(12, 12), 0.5
    whole = {"resolution": 12, "crop": (1, 1), "color": strength}
    names = ("brightness", "contrast", "saturation")
    draws = []
    for seed in range(60):
        out, scalars = augment(image, np.random.default_rng(seed), **whole)
        plain, without = augment(image, np.random.default_rng(seed), **whole | {"color": 0.0})
        assert {name: scalars[name] for name in without} == without  # crop and flip stay
        assert set(scalars) - set(without) == set(names)
        brightness, contrast, saturation = (scalars[name] for name in names)
        draws.append([brightness, contrast, saturation])
        luma = np.array([0.299, 0.587, 0.114])
        expected = plain * float(brightness)
        mean = (expected @ luma).mean()
        expected = mean + contrast * (expected - mean)
        gray = (expected @ luma)[..., None]
        expected = (gray + saturation * (expected - gray)).round().clip(0, 255)
        assert np.abs(out.astype(int) - expected).max() <= 1
    draws = np.array(draws)
    assert 0.5 <= draws.min() < 0.6 and 1.4 < draws.max() <= 1.5
    assert np.abs(np.corrcoef(draws.T) - np.eye(3)).max() < 0.4  # drawn each by itself


def test_no_saturation_is_gray_and_no_contrast_is_one_color():
    view = View(picture(5, 5), 0, 0, 1, 1, False, 5, 5)
    gray = jitter(view, 1.0, 1.0, 0.0).image
    assert (gray == gray[..., :1]).all()
    flat = jitter(view, 1.0, 0.0, 1.0).image
    assert (flat == flat[0, 0]).all()
    np.testing.assert_array_equal(jitter(view, 1.0, 1.0, 1.0).image, view.image)
    assert not jitter(view, 0.0, 1.0, 1.0).image.any()
