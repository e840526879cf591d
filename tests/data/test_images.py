"""Tests of lazy decoding: same windows and metadata as of decoded images, similar pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from condiff_jax.data.augment import augment
from condiff_jax.data.images import FORMATS, SPARE, Encoded, decode
from condiff_jax.data.resize import resize


def random_image(height, width, seed=0):
    """Noise whose amplitude falls with frequency, like that of photographs."""
    rng, out = np.random.default_rng(seed), np.zeros((height, width, 3))
    for cells in (2, 5, 13, 32, 80):
        small = rng.normal(size=(cells, cells, 3)).astype(np.float32) * 80 / cells
        bands = [Image.fromarray(b).resize((width, height), 3) for b in np.moveaxis(small, -1, 0)]
        out += np.stack([np.asarray(band) for band in bands], -1)
    return np.clip(128 + out, 0, 255).astype(np.uint8)


def encode(pixels, format="JPEG", mode="RGB", orientation=None, **options):
    out, exif = io.BytesIO(), Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(out, format, exif=exif, **options)
    return out.getvalue()


def both(data, resolution, **options):
    """Augment the file and its decoded image with the same random numbers."""
    images = Encoded(data), decode(data)
    return [
        augment(image, np.random.default_rng(7), resolution=resolution, **options)
        for image in images
    ]


@pytest.mark.parametrize("size", [(400, 300), (301, 401), (307, 613)])
@pytest.mark.parametrize(
    ("resolution", "scale"), [(256, 1), (96, 2), (64, 2), (48, 4), (24, 8), (8, 8)]
)
def test_a_smaller_decode_is_nearly_the_same(size, resolution, scale, monkeypatch):
    data = encode(random_image(*size), quality=90)
    for crop in ((0.93, 0.94), (1, 1)):
        (lazy, scalars), (full, expected) = both(data, resolution, crop=crop)
        assert scalars == expected and tuple(scalars) == tuple(expected)
        assert lazy.shape == full.shape and lazy.dtype == full.dtype
        difference = np.abs(lazy.astype(int) - full)
        assert difference.mean() < 1.5 and difference.max() < 16
        assert (scale > 1) == bool(difference.any())
    scales, decode_at = [], Encoded._decode
    monkeypatch.setattr(
        Encoded, "_decode", lambda self, at: scales.append(at) or decode_at(self, at)
    )
    Encoded(data).window(3, 5, 280, resolution)
    assert scales == [scale]
    assert 280 / scale >= resolution * SPARE or scale == 1


def test_windows_are_exact_to_a_fraction_of_a_pixel():
    rows, columns = np.mgrid[:512, :512]
    ramps = np.stack([rows // 2, columns // 2, 0 * rows], -1).astype(np.uint8)
    data = encode(ramps, quality=100, subsampling=0)
    for top, left in ((0, 0), (1, 2), (3, 7), (13, 5)):
        small = Encoded(data).window(top, left, 480, 32).astype(float)  # decoded at 1/8
        centers = (np.arange(32) + 0.5) * 15 - 0.5
        assert np.abs(small[:, 4:-4, 0] - (top + centers[:, None]) / 2)[2:-2].max() < 1.6
        assert np.abs(small[4:-4, :, 1] - (left + centers) / 2)[:, 2:-2].max() < 1.6
        assert abs((small[4:-4, 4:-4, 0] - (top + centers[4:-4, None]) / 2).mean()) < 0.3
    wide = encode(ramps[:480, :493], quality=100, subsampling=0)  # its center is not on a block
    expected = resize(decode(wide), (6, 0, 480), 32)
    difference = Encoded(wide).window(0, 6, 480, 32).astype(int) - expected
    assert np.abs(difference[..., :2].mean((0, 2))).max() < 0.6


JPEGS = [
    {"subsampling": 0},
    {"subsampling": 1},
    {"subsampling": 2},
    {"progressive": True},
    {"keep_rgb": True},
    {"restart_marker_rows": 1},
]


@pytest.mark.parametrize("options", JPEGS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("scale", [1, 2, 4, 8])
def test_pixels_of_jpegs_are_those_of_pillow(options, mode, scale):
    for size in ((97, 130), (64, 48), (8, 9)):
        data = encode(random_image(*size), mode=mode, **options)
        image = Image.open(io.BytesIO(data))
        image.draft(None, (image.width // scale, image.height // scale))
        expected = np.asarray(image.convert("RGB"))
        pixels = Encoded(data)._decode(scale)
        assert pixels.shape == expected.shape == (*(-(-n // scale) for n in size), 3)
        assert np.abs(pixels.astype(int) - expected).max() <= 2  # builds of libjpeg differ


def test_damaged_jpegs_are_decoded_as_by_pillow():
    """Files with lost or extra bytes give Pillow's pixels or Pillow's error."""
    whole = encode(random_image(90, 121), restart_marker_rows=1)
    rng = np.random.default_rng(0)
    decoded = []
    files = [whole[:cut] for cut in range(20, len(whole), 97)]
    files += [whole[:-2], whole[:-2] + b"1234" + whole[-2:], whole + b"more"]
    for at in rng.integers(20, len(whole), 60):
        files.append(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    for data in files:
        results = []
        for read in (decode, lambda d: np.asarray(Image.open(io.BytesIO(d)).convert("RGB"))):
            try:
                results.append(read(data))
            except (OSError, SyntaxError, ValueError) as error:
                results.append(type(error))
        np.testing.assert_array_equal(*results)
        decoded.append(isinstance(results[0], np.ndarray))
    assert 10 < sum(decoded) < len(files) - 10


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", FORMATS)
def test_rotated_images_and_other_formats(orientation, format):
    lossless = {"lossless": True} if format == "WEBP" else {}
    data = encode(random_image(90, 121), format, orientation=orientation, **lossless)
    shape = decode(data).shape[:2]
    image = Encoded(data)
    assert (image.height, image.width) == shape and image.transposed == (orientation > 4)
    (lazy, scalars), (full, expected) = both(data, 20, crop=(0.5, 0.9))
    assert scalars == expected
    if format != "JPEG" or orientation > 1:
        np.testing.assert_array_equal(lazy, full)
    else:
        assert np.abs(lazy.astype(int) - full).mean() < 1.5


@pytest.mark.parametrize(
    ("format", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")],
)
def test_modes(format, mode):
    data = encode(random_image(80, 100), format, mode)
    (lazy, scalars), (full, expected) = both(data, 60)
    assert scalars == expected
    np.testing.assert_array_equal(lazy, full)
    (lazy, _), (full, _) = both(data, 20)
    assert np.abs(lazy.astype(int) - full).mean() < 1.5


def test_16_bit_gray_keeps_its_high_byte():
    deep = (random_image(40, 50)[..., 0].astype(np.uint16) << 8) + 9
    out = io.BytesIO()
    Image.fromarray(deep).save(out, "PNG")
    np.testing.assert_array_equal(decode(out.getvalue())[..., 2], deep >> 8)
    (lazy, _), (full, _) = both(out.getvalue(), 20)
    np.testing.assert_array_equal(lazy, full)


def test_an_image_can_be_read_again():
    data = encode(random_image(200, 160))
    image = Encoded(data)
    first = image.window(3, 5, 150, 16)
    np.testing.assert_array_equal(image.decode(), decode(data))
    np.testing.assert_array_equal(image.window(3, 5, 150, 16), first)
    expected = resize(decode(data), (5, 3, 150), 150)
    np.testing.assert_array_equal(image.window(3, 5, 150, 150), expected)


def test_small_and_thin_images():
    for size in ((1, 1), (1, 40), (9, 8), (17, 300)):
        data = encode(random_image(*size))
        for resolution in (1, 2, 16):
            (lazy, scalars), (full, expected) = both(data, resolution)
            assert scalars == expected and lazy.shape == full.shape


def test_truncated_images_are_an_error_at_any_size():
    data = encode(random_image(300, 300), quality=95)
    image = Encoded(data[:-2000])
    assert (image.height, image.width) == (300, 300)
    for size in (8, 300):
        with pytest.raises(OSError, match="truncated"):
            Encoded(data[:-2000]).window(0, 0, 100, size)
    with pytest.raises(OSError, match="identify"):
        Encoded(data[100:])


def test_too_large_images_are_an_error_before_they_are_decoded(monkeypatch):
    data = encode(random_image(40, 50))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with pytest.raises(Image.DecompressionBombError, match="50x40 pixels"):
        Encoded(data)
