"""Feature networks process each image once, in batches of one size; reading of image folders."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from condiff_jax.evaluation.metrics.features import FeatureNetwork, check_features, read_folder
from condiff_jax.runtime import sharding


def means(scale=1.0, **settings):
    """Create a feature network of channel means, which has closed forms at any size."""
    fields = dict(
        name="means",
        sha256="1" * 64,
        width=3,
        params=np.float32(scale),
        apply=lambda scale, x: scale * x.astype(jnp.float32).mean((1, 2)),
    )
    return FeatureNetwork(**fields | settings)


def random_images(n, height=4, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("n", [1, 4, 11])
def test_features_do_not_depend_on_batches(n):
    images, shapes = random_images(n), []

    def prepare(batch):
        shapes.append(batch.shape)
        return batch

    features = means(batch=4, prepare=prepare)(images)
    assert features.shape == (n, 3) and features.dtype == np.float32
    np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-5)
    assert set(shapes) == {(min(n, 4), 4, 5, 3)}  # one compilation


@pytest.mark.parametrize("n", [1, 4, 21])
def test_devices_share_the_work(n):
    images, mesh = random_images(n), sharding.create_mesh()
    assert mesh.size > 1
    network = means(batch=10).on(mesh)
    assert network.batch % mesh.size == 0
    np.testing.assert_allclose(network(images), images.mean((1, 2)), rtol=1e-5)
    lowered = network._compiled.lower(
        network._on_device, sharding.put_global(mesh, random_images(8))
    )
    assert f"num_partitions = {mesh.size}" in lowered.as_text()


def test_the_network_gets_prepared_images():
    halved = means(prepare=lambda images: images[:, ::2])
    images = random_images(3)
    np.testing.assert_allclose(halved(images), images[:, ::2].mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (random_images(2).astype(np.float32), "must be uint8 .*float32"),
        (random_images(2)[..., :1], r"must be uint8 \(N, H, W, 3\)"),
        (random_images(2)[..., 0], "must be uint8"),
        (np.zeros((2, 4, 5, 4), np.uint8), "must be uint8"),
        (random_images(0), "must be uint8"),
        (random_images(1, 2, 9), "must be 4 pixels or more"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        means(min_side=4)(images)


def test_non_finite_features_are_an_error():
    with pytest.raises(ValueError, match="means returns NaN or infinity"):
        means(np.nan)(random_images(2))


def test_bad_features():
    good = np.zeros((2, 3))
    for bad in (np.zeros((2, 4)), np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match="features must be"):
            check_features(good, bad)
    for first, second in ((good, good + np.nan), (good + np.inf, good)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            check_features(first, second)


def save(images, folder):
    for i, image in enumerate(images):
        path = folder / ("a" if i % 2 else "b") / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(path)


def test_folders_are_read_in_order_of_names(tmp_path):
    images = random_images(5)
    save(images, tmp_path)
    (tmp_path / "notes.txt").write_text("no image")
    parts = list(read_folder(str(tmp_path), batch=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), images[[1, 3, 0, 2, 4]])


def test_folders_without_images(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no images .* in "):
            next(read_folder(str(folder)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_other_color_modes_are_named(tmp_path, mode):
    save(random_images(2), tmp_path)
    if mode == "I;16":
        image = Image.fromarray(np.zeros((4, 5), np.uint16))
    else:
        image = Image.new(mode, (5, 4))
    image.save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=f"c.png is an image of mode {mode}, not RGB"):
        list(read_folder(str(tmp_path)))


def test_mixed_sizes_are_named(tmp_path):
    save(random_images(2), tmp_path)
    Image.fromarray(random_images(1, 4, 6)[0]).save(tmp_path / "c.png")
    for batch in (1, 8):
        with pytest.raises(ValueError, match="c.png has 4 x 6 pixels, but .*1.png 4 x 5"):
            list(read_folder(str(tmp_path), batch))


def test_broken_files_are_named(tmp_path):
    save(random_images(2), tmp_path)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    for content in (b"", b"nothing", whole[:-30]):
        (tmp_path / "c.png").write_bytes(content)
        with pytest.raises(ValueError, match="c.png cannot be read"):
            list(read_folder(str(tmp_path)))


def test_params_are_put_on_the_device_once():
    network = means()
    assert network._on_device is network._on_device
    assert dataclasses.replace(network, params=np.float32(2))(random_images(1)).max() > 1


def test_accelerators_multiply_with_all_bits():
    network = means(
        apply=lambda scale, x: scale * (x.astype(jnp.float32).mean((1, 2)) @ jnp.eye(3))
    )
    text = network._compiled.lower(network._on_device, random_images(2)).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text
