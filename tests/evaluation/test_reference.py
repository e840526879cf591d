"""Reference data: the same statistics for any number of hosts, and its identity."""

import dataclasses
import shutil
import threading
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from condiff_jax.config.errors import ConfigError
from condiff_jax.data import augment
from condiff_jax.data.builders.prepare import prepare
from condiff_jax.data.shapes import FINE_CLASSES
from condiff_jax.evaluation import image_quality, reference
from condiff_jax.evaluation.metrics import fid
from condiff_jax.evaluation.metrics.frechet import Moments
from condiff_jax.evaluation.reference import Reference
from tests import tiny
from tests.evaluation.test_image_quality import FIELDS, Fake, measure, network, small  # noqa: F401

GRAYS = [np.full((20, 24, 3), 40 * i, np.uint8) for i in range(6)]


def prepare_images(folder, images):
    """Prepare a TFDS data set of images (H, W, 3) in two classes, with the builder of folders."""
    for i, image in enumerate(images):
        class_folder = folder / "in" / f"class {i % 2}"
        class_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(class_folder / f"{i}.png")
    prepare("folder", folder / "in", folder / "out", processes=1)
    return folder / "out"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return str(prepare_images(tmp_path_factory.mktemp("prepared"), GRAYS))


def config_of(path, **fields):
    fields = {"evaluation.path": path, "evaluation.reference": "train"} | fields
    return tiny.config(**FIELDS | fields)


def test_the_reference_can_be_another_data_set(prepared, monkeypatch):
    ((positions, features),) = Reference(config_of(prepared)).features(network())
    np.testing.assert_array_equal(positions, range(6))
    assert sorted(np.rint(255 * features[:, 0])) == [0, 40, 80, 120, 160, 200]
    monkeypatch.setattr(reference, "SUBSET", 4)
    subset = Reference(config_of(prepared, **{"evaluation.reference": "train_200k"}))
    assert len(set(subset.numbers)) == len(subset.numbers) == 4 and max(subset.numbers) > 3
    with pytest.raises(ConfigError, match="evaluation.path: .* no split validation, only train"):
        Reference(config_of(prepared, **{"evaluation.reference": "coco"}))
    latents = {"data.name": "latents", "autoencoder.name": "kl", "data.resolution": 32}
    latents |= {"data.path": prepared, "evaluation.path": ""}
    with pytest.raises(
        ConfigError, match="evaluation.path: empty, and data.name=latents has no images"
    ):
        Reference(config_of(prepared, **latents))
    monkeypatch.setattr(reference, "SUBSET", 1)
    single = {"evaluation.reference": "train_200k", "evaluation.metrics": ("fid",)}
    with pytest.raises(
        ConfigError, match="evaluation.samples: the metrics need 2 images or more, got 9 and 1"
    ):
        tiny.evaluation(config_of(prepared, **single))
    classes = config_of(prepared, **{"data.semantics": "class", "model.name": "dit_ln"})
    with pytest.raises(ConfigError, match="evaluation.path: its classes are not those"):
        Reference(classes).captions_or_labels(3, tiny.objective(classes))


def test_labels_are_shuffled_and_repeated(prepared):
    data = Reference(config_of(prepared))
    vocabulary = SimpleNamespace(classes=data.source.classes)
    objective = SimpleNamespace(text_encoder=None, vocabulary=vocabulary)
    stored = [data.source[i]["label"] for i in range(6)]
    labels = data.captions_or_labels(15, objective)
    assert sorted(stored) == sorted(labels[:6]) and stored != labels[:6]
    assert labels == (labels[:6] * 3)[:15]


def on_hosts(monkeypatch, count, work):
    """Return the results of work() on each of `count` processes, which are threads here."""
    host, barrier, shared = threading.local(), threading.Barrier(count), {}

    def gather(values):
        shared[host.index] = values
        barrier.wait(20)
        out = [np.stack(rows) for rows in zip(*(shared[i] for i in range(count)), strict=True)]
        barrier.wait(20)
        return out

    results = {}

    def run(index):
        host.index = index
        results[index] = work()

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(host, "index", 0))
    monkeypatch.setattr(reference, "multihost_utils", SimpleNamespace(process_allgather=gather))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_hosts_share_the_reading_and_compute_the_statistics_of_one_host(monkeypatch, count):
    data = Reference(tiny.config(**FIELDS | {"evaluation.samples": 29}))
    monkeypatch.setattr(reference, "PART", 4)  # 8 parts: the last hosts have less to do
    expected, expected_features = reference.describe(network(), data, samples=7)
    read = []

    def recording_crop(crop, position):
        read.append(position)
        return original(crop, position)

    original = reference.CenterCrop.__call__
    monkeypatch.setattr(reference.CenterCrop, "__call__", recording_crop)
    for statistics, features in on_hosts(
        monkeypatch, count, lambda: reference.describe(network(), data, samples=7)
    ):
        np.testing.assert_array_equal(statistics.mean, expected.mean)
        np.testing.assert_array_equal(statistics.covariance, expected.covariance)
        np.testing.assert_array_equal(features, expected_features)
    assert sorted(read) == list(range(29)) and expected.count == 29


def test_moments_are_those_of_center_crops():
    data = Reference(tiny.config(**FIELDS | {"evaluation.samples": 5}))
    statistics, features = reference.describe(network(), data, samples=9)
    squares = [augment.center(data.source[i]["image"], 16) for i in range(5)]
    np.testing.assert_array_equal(features, network()(np.stack(squares)))
    moments = Moments()
    moments.add(features)
    np.testing.assert_array_equal(statistics.covariance, moments.result()[1])
    assert statistics.resolution == (16, 16) and statistics.network == "means"
    data.config = dataclasses.replace(
        data.config, data=dataclasses.replace(data.config.data, workers=3)
    )
    with mock.patch.object(reference, "read_ahead", side_effect=lambda d, _: iter(d)) as read:
        _, chosen = reference.describe(network(), data, samples=2)
    assert read.call_args.args[1] == 3
    rows = [np.flatnonzero((features == row).all(1)).tolist() for row in chosen]
    assert len(rows) == 2 and rows[0] < rows[1] and rows != [[0], [1]]


def test_broken_images_are_left_out(prepared):
    data = Reference(config_of(prepared))
    original = data.source._record

    def broken(i):
        if i in (0, 3):
            raise ValueError("no image")
        return original(i)

    with mock.patch.object(data.source, "_record", broken):
        statistics, features = reference.describe(network(), data, samples=6)
        assert statistics.count == len(features) == 4  # without the images that replace them
        ((positions, all_features),) = data.features(network())
    np.testing.assert_array_equal(positions, [1, 2, 4, 5])
    np.testing.assert_array_equal(all_features, features)
    with mock.patch.object(data.source, "_record", side_effect=ValueError("no image")):
        data.source._reset()
        with pytest.raises(ConfigError, match="evaluation.path: .* no decodable train image"):
            reference.describe(network(), data)


def test_the_digest_depends_on_the_content_not_on_the_path(prepared, tmp_path):
    digest = Reference(config_of(prepared)).digest()
    shutil.copytree(prepared, tmp_path / "copy")
    assert Reference(config_of(str(tmp_path / "copy"))).digest() == digest
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    other = str(prepare_images(tmp_path, [*GRAYS[:5], noise]))
    assert Reference(config_of(other)).digest() != digest
    assert Reference(config_of(prepared, **{"data.resolution": 32})).digest() != digest
    assert Reference(config_of(prepared)).digest("a network") != digest
    record = tiny.evaluation(config_of(prepared)).identity["evaluation"]
    assert record["path"] == prepared and record["reference_sha256"] == digest
    # Also where the reference provides prompts only, the evaluation's identity depends on it.
    for metric in ("fid", "size_response"):
        records = [
            tiny.evaluation(config).identity["evaluation"]
            for path in (prepared, str(tmp_path / "copy"), other)
            for fields in [{"evaluation.metrics": (metric,), "evaluation.reference": "train"}]
            for config in [
                tiny.config(**FIELDS | fields | {"data.name": "tfds", "data.path": path})
            ]
        ]
        assert records[0] == records[1] != records[2]
    for change in ({"sizes": (12, 20)}, {"classes": len(FINE_CLASSES)}, {"entangled": 0.5}):
        changed = tiny.config(**FIELDS | {f"data.{name}": value for name, value in change.items()})
        assert Reference(changed).digest() != Reference(tiny.config(**FIELDS)).digest()


def test_mode_reference_writes_statistics_for_fid(tmp_path, capsys, request):
    path = str(tmp_path / "out" / "reference.npz")
    config = tiny.config(**FIELDS | {"evaluation.statistics": path})
    image_quality.run_reference(config)
    assert "over 9 images" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["reference.npz"]
    killed = mock.patch.object(np, "savez", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        statistics = fid.load(path)
        statistics.save(path)  # the old file stays whole
    statistics = fid.load(path)
    assert statistics.sha256 == "sha of 1.0" and statistics.resolution == (16, 16)
    image_quality.run_reference(config)
    assert "Nothing to do" in capsys.readouterr().out
    for other in ({"evaluation.reference": "train"}, {"evaluation.samples": 8}):
        fields = FIELDS | other | {"evaluation.statistics": path}
        with pytest.raises(ConfigError, match="exists, but is not of these images"):
            image_quality.run_reference(tiny.config(**fields))
    for samples, warnings in ((6, 1), (7, 0)):  # images for the network's 6 features
        fields = {"evaluation.samples": samples, "evaluation.statistics": f"{path}-{samples}.npz"}
        with mock.patch.object(image_quality.logging, "warning") as warning:
            image_quality.run_reference(tiny.config(**FIELDS | fields))
        assert warning.call_count == warnings
    metrics = {"evaluation.metrics": ("fid",)}
    expected = measure(tmp_path / "computed", Fake(tiny.config(**FIELDS | metrics)))
    config = tiny.config(**FIELDS | metrics | {"evaluation.statistics": path})
    with mock.patch.object(reference, "describe", side_effect=AssertionError):
        assert measure(tmp_path / "given", Fake(config)) == pytest.approx(expected)
    # evaluation.statistics is used for Inception alone, not for the network of frechet_shapes.
    request.getfixturevalue("small")["shapes"] = network(3.0)
    both = {"evaluation.metrics": ("fid", "frechet_shapes"), "evaluation.statistics": path}
    evaluation = tiny.config(**FIELDS | both).evaluation
    values = measure(tmp_path / "both", Fake(dataclasses.replace(config, evaluation=evaluation)))
    assert values["frechet_shapes"] == pytest.approx(9 * expected["fid"], rel=1e-4)
    dataclasses.replace(statistics, sha256="other" * 5).save(path)
    with pytest.raises(ConfigError, match="evaluation.statistics: the reference is of means"):
        tiny.evaluation(config)  # before any image is sampled
    with pytest.raises(ConfigError, match="evaluation.statistics: the reference is of means"):
        measure(tmp_path / "other", Fake(config))
    dataclasses.replace(statistics, resolution=(32, 32)).save(path)
    with pytest.raises(ConfigError, match="images of 32 x 32 pixels, not 16 x 16"):
        tiny.evaluation(config)
    with pytest.raises(ConfigError, match="evaluation.statistics: empty"):
        image_quality.run_reference(tiny.config(**FIELDS))
