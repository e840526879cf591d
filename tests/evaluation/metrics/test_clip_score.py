"""CLIP score is 100 x the cosine; images are smoothed, resized and center-cropped."""

import numpy as np
import pytest

from condiff_jax.evaluation.metrics.clip_score import ClipScore, square
from tests.evaluation.metrics.test_features import means


def test_is_a_hundred_times_the_cosine():
    # The mean colors are (2, 2, 1) and (0, 3, 4).
    images = np.array([[2, 2, 1], [0, 3, 4]], np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    embeddings = {"along": [4.0, 4, 2], "against": [0, -6.0, -8]}
    score = ClipScore(means(), lambda captions: np.array([embeddings[c] for c in captions]))
    np.testing.assert_allclose(score(images, ["along", "against"]), [100, -100], rtol=1e-6)
    np.testing.assert_allclose(score(images[::-1], ["along", "along"])[0], 100 * 20 / 30)
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        score(images, ["along"])
    embeddings["nothing"] = [0, 0, 0]
    embeddings["unknown"] = [np.nan, 1, 1]
    for caption in ("nothing", "unknown"):
        with pytest.raises(ValueError, match="0, NaN or infinite"):
            score(images, ["along", caption])


@pytest.mark.parametrize("high", [False, True])
def test_images_are_smoothed_and_center_cropped(high):
    rows, columns = np.indices((64, 128))
    image = np.where((rows + columns) % 2, 160, 96).astype(np.uint8)
    image[:, :28] = image[:, -28:] = 255  # cropped, except for pixels near the middle
    images = image[None, :, :, None].repeat(3, 3)
    out = square(images.swapaxes(1, 2) if high else images, 16)
    assert out.shape == (1, 16, 16, 3) and out.dtype == np.uint8
    np.testing.assert_allclose(out, 128, atol=6)


def test_images_of_the_right_size_are_unchanged():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(square(images, 16), images)
