"""Feature networks see every picture once, in batches of one size; others are errors."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from condiff_jax.evaluation.metrics.features import FeatureNetwork, check_features, read_folder
from condiff_jax.runtime import sharding


def means(scale=1.0, **settings):
    """A feature network of the channels' means: of any size, with closed forms."""
    fields = dict(
        name="means",
        sha256="1" * 64,
        width=3,
        params=np.float32(scale),
        apply=lambda scale, x: scale * x.astype(jnp.float32).mean((1, 2)),
    )
    return FeatureNetwork(**fields | settings)


def pictures(n, height=4, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("n", [1, 4, 11])
def test_features_do_not_depend_on_batches(n):
    images, seen = pictures(n), []

    def prepare(batch):
        seen.append(batch.shape)
        return batch

    features = means(batch=4, prepare=prepare)(images)
    assert features.shape == (n, 3) and features.dtype == np.float32
    np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-5)
    assert set(seen) == {(min(n, 4), 4, 5, 3)}  # one compilation


@pytest.mark.parametrize("n", [1, 4, 21])
def test_devices_share_the_work(n):
    images, mesh = pictures(n), sharding.create_mesh()
    assert mesh.size > 1
    network = means(batch=10).on(mesh)
    assert network.batch % mesh.size == 0
    np.testing.assert_allclose(network(images), images.mean((1, 2)), rtol=1e-5)
    lowered = network._compiled.lower(network._on_device, sharding.put_global(mesh, pictures(8)))
    assert f"num_partitions = {mesh.size}" in lowered.as_text()


def test_what_is_prepared_is_what_the_network_gets():
    halved = means(prepare=lambda images: images[:, ::2])
    images = pictures(3)
    np.testing.assert_allclose(halved(images), images[:, ::2].mean((1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    "images, message",
    [
        (pictures(2).astype(np.float32), "must be uint8 .*float32"),
        (pictures(2)[..., :1], r"must be uint8 \(N, H, W, 3\)"),
        (pictures(2)[..., 0], "must be uint8"),
        (np.zeros((2, 4, 5, 4), np.uint8), "must be uint8"),
        (pictures(0), "must be uint8"),
        (pictures(1, 2, 9), "must be 4 pixels or more"),
    ],
)
def test_bad_pictures(images, message):
    with pytest.raises(ValueError, match=message):
        means(least_side=4)(images)


def test_broken_weights_do_not_give_numbers():
    with pytest.raises(ValueError, match="means gives NaN or infinity"):
        means(np.nan)(pictures(2))


def test_bad_features():
    good = np.zeros((2, 3))
    for bad in (np.zeros((2, 4)), np.zeros((0, 3)), np.zeros(3)):
        with pytest.raises(ValueError, match="features must be"):
            check_features(good, bad)
    for one, other in ((good, good + np.nan), (good + np.inf, good)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            check_features(one, other)


def save(images, folder):
    for i, image in enumerate(images):
        path = folder / ("a" if i % 2 else "b") / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image).save(path)


def test_folders_are_read_in_order_of_names(tmp_path):
    images = pictures(5)
    save(images, tmp_path)
    (tmp_path / "notes.txt").write_text("no picture")
    parts = list(read_folder(str(tmp_path), batch=2))
    assert [len(part) for part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(parts), images[[1, 3, 0, 2, 4]])


def test_folders_without_pictures(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(FileNotFoundError, match="no pictures .* in "):
            next(read_folder(str(folder)))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_other_colours_are_named(tmp_path, mode):
    save(pictures(2), tmp_path)
    odd = np.zeros((4, 5), np.uint16) if mode == "I;16" else Image.new(mode, (5, 4))
    (odd if mode != "I;16" else Image.fromarray(odd)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=f"c.png is a picture of mode {mode}, not RGB"):
        list(read_folder(str(tmp_path)))


def test_mixed_sizes_are_named(tmp_path):
    save(pictures(2), tmp_path)
    Image.fromarray(pictures(1, 4, 6)[0]).save(tmp_path / "c.png")
    for batch in (1, 8):
        with pytest.raises(ValueError, match="c.png has 4 x 6 pixels, but .*1.png 4 x 5"):
            list(read_folder(str(tmp_path), batch))


def test_broken_files_are_named(tmp_path):
    save(pictures(2), tmp_path)
    whole = (tmp_path / "a" / "1.png").read_bytes()
    for content in (b"", b"nothing", whole[:-30]):
        (tmp_path / "c.png").write_bytes(content)
        with pytest.raises(ValueError, match="c.png cannot be read"):
            list(read_folder(str(tmp_path)))


def test_params_are_put_on_the_device_once():
    network = means()
    assert network._on_device is network._on_device
    assert dataclasses.replace(network, params=np.float32(2))(pictures(1)).max() > 1


def test_accelerators_multiply_with_all_bits():
    network = means(
        apply=lambda scale, x: scale * (x.astype(jnp.float32).mean((1, 2)) @ jnp.eye(3))
    )
    text = network._compiled.lower(network._on_device, pictures(2)).as_text()
    assert "precision = [HIGHEST, HIGHEST]" in text
