"""Size response: closed forms, and 0 where size control has no effect."""

import numpy as np
import pytest
from PIL import Image

from condiff_jax.data.shapes import make_scene, render
from condiff_jax.evaluation.metrics import response
from condiff_jax.evaluation.metrics.prompt import sharpness


def flat(*levels):
    """Create images (1, S, 16, 16, 3), each of one gray level."""
    return np.stack([np.full((16, 16, 3), level, np.uint8) for level in levels])[None]


def test_closed_form_of_gray_images():
    images = np.concatenate([flat(0, 51, 255), flat(0, 0, 51)])
    values = response.size_response(images, (8, 16, 32), 16)
    assert values["size_l2"] == pytest.approx(np.mean([0.2, 1, 0.8, 0, 0.2, 0.2]))
    assert values["size_l2_hr"] == pytest.approx(np.mean([0.8, 0.2]))
    assert "size_lpips" not in values


def test_pixel_distance_is_the_root_of_the_mean_square():
    black, other = flat(0)[0], flat(0)[0].copy()
    other[:, :, :4] = 255  # a quarter
    np.testing.assert_allclose(response.pixel_distance(black, other), [0.5])
    np.testing.assert_allclose(response.pixel_distance(other, black), [0.5])  # no uint8 overflow


def test_identical_images_have_no_response():
    image = render(make_scene("train", 0), 32, 32)
    images = np.broadcast_to(image, (2, 3, *image.shape))
    values = response.size_response(images, (16, 32, 64), 32, response.pixel_distance)
    for name in ("size_l2", "size_l2_hr", "size_lpips", "size_lpips_hr"):
        assert values[name] == 0
    assert values["sharpness_response"] == pytest.approx(0, abs=1e-12)
    assert values["sharpness_16"] == values["sharpness_64"] == pytest.approx(sharpness(image))


def test_order_of_prompts_and_sizes_does_not_matter():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 16, 3)).astype(np.uint8)
    values = response.size_response(images, (8, 12, 16, 24), 12)
    reversed_values = response.size_response(images[::-1, ::-1], (24, 16, 12, 8), 12)
    assert values == pytest.approx(reversed_values)


def test_the_mean_of_parts_is_the_response_of_all_prompts():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16, 3)).astype(np.uint8)
    images[0] //= 4  # the first part differs, so that the parts' weights matter
    sizes = (8, 16, 24)
    arguments = sizes, 16, lambda a, b: response.pixel_distance(a, b) ** 2
    parts = [
        (len(part), response.size_response(part, *arguments)) for part in np.split(images, [1, 3])
    ]
    expected = response.size_response(images, *arguments)
    assert response.mean_response(parts, sizes) == pytest.approx(expected)
    low = [(1, response.size_response(flat(0, 9), (8, 16), 16))]
    assert response.mean_response(low, (8, 16))["size_l2_hr"] is None


def test_lpips_is_averaged_over_pairs_and_then_prompts():
    """Sec. 3.1: ten pairs of five sizes; LPIPS/HR uses those of 256, 512 and 1024 only."""
    images = flat(0, 10, 30, 70, 150)  # each pair has its own difference

    def distances(a, b):
        return np.abs(a.astype(int) - b).mean((1, 2, 3))

    values = response.size_response(images, (64, 128, 256, 512, 1024), 256, distances)
    pairs = [10, 30, 70, 150, 20, 60, 140, 40, 120, 80]
    assert values["size_lpips"] == pytest.approx(np.mean(pairs))
    assert values["size_lpips_hr"] == pytest.approx(np.mean([40, 120, 80]))


def test_fewer_than_two_high_sizes_give_none():
    values = response.size_response(flat(0, 9), (8, 16), 16, response.pixel_distance)
    assert values["size_l2_hr"] is None and values["size_lpips_hr"] is None
    assert values["size_l2"] is not None


def test_lpips_is_the_given_distance():
    values = response.size_response(flat(0, 9), (8, 16), 8, lambda a, b: np.full(len(a), 7.0))
    assert values["size_lpips"] == values["size_lpips_hr"] == 7


@pytest.mark.parametrize("power", [-1, 0, 2])
def test_slope_of_a_power(power):
    sizes = np.array([12.0, 24.0, 48.0, 100.0])
    assert response.log_slope(sizes, 3.0 * sizes**power) == pytest.approx(power, abs=1e-9)


def test_slope_of_images_without_contrast_is_finite():
    assert response.log_slope((8, 16), (0, 0)) == pytest.approx(0, abs=1e-9)
    assert 0 < response.log_slope((8, 16), (0, 1)) < np.inf


def test_sharpness_rises_with_size():
    def blurred(side):
        image = Image.fromarray(render(make_scene("train", 3), 64, 64))
        return np.asarray(image.resize((side, side)).resize((64, 64), Image.Resampling.BICUBIC))

    images = np.stack([blurred(side) for side in (16, 32, 64)])[None]
    values = response.size_response(images, (16, 32, 64), 64)
    assert values["sharpness_16"] < values["sharpness_32"] < values["sharpness_64"]
    assert 0.2 < values["sharpness_response"] < 3


def test_bad_input():
    with pytest.raises(ValueError, match="two sizes"):
        response.size_distance(flat(1))
    with pytest.raises(ValueError, match="images must be"):
        response.size_response(flat(0, 1), (8, 16, 32), 16)
    with pytest.raises(ValueError, match="images must be"):
        response.size_response(flat(0, 1).astype(np.float32), (8, 16), 16)
