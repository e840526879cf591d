"""The data that pictures are compared with: whatever reads it, the same statistics."""

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

GREY = [np.full((20, 24, 3), 40 * i, np.uint8) for i in range(6)]


def make(folder, pictures):
    """A TFDS data set of pictures (H, W, 3) in two classes, by the builder for folders."""
    for i, picture in enumerate(pictures):
        place = folder / "in" / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(place / f"{i}.png")
    prepare("folder", folder / "in", folder / "out", processes=1)
    return folder / "out"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return str(make(tmp_path_factory.mktemp("prepared"), GREY))


def of(path, **fields):
    fields = {"evaluation.path": path, "evaluation.reference": "train"} | fields
    return tiny.config(**FIELDS | fields)


def test_it_can_be_another_data_set(prepared, monkeypatch):
    ((places, features),) = Reference(of(prepared)).features(network())
    np.testing.assert_array_equal(places, range(6))
    assert sorted(np.rint(255 * features[:, 0])) == [0, 40, 80, 120, 160, 200]
    monkeypatch.setattr(reference, "SUBSET", 4)
    some = Reference(of(prepared, **{"evaluation.reference": "train_200k"}))
    assert len(set(some.numbers)) == len(some.numbers) == 4 and max(some.numbers) > 3
    with pytest.raises(ConfigError, match="evaluation.path: .* no split validation, only train"):
        Reference(of(prepared, **{"evaluation.reference": "coco"}))
    latents = {"data.name": "latents", "autoencoder.name": "kl", "data.resolution": 32}
    latents |= {"data.path": prepared, "evaluation.path": ""}
    with pytest.raises(
        ConfigError, match="evaluation.path: empty, and data.name=latents has no images"
    ):
        Reference(of(prepared, **latents))
    monkeypatch.setattr(reference, "SUBSET", 1)
    one = {"evaluation.reference": "train_200k", "evaluation.metrics": ("fid",)}
    with pytest.raises(
        ConfigError, match="evaluation.samples: the metrics need 2 images or more, got 9 and 1"
    ):
        tiny.evaluation(of(prepared, **one))
    classes = of(prepared, **{"data.semantics": "class", "model.name": "dit_ln"})
    with pytest.raises(ConfigError, match="evaluation.path: its classes are not those"):
        Reference(classes).asked(3, tiny.objective(classes))


def test_requests_are_its_own_in_another_order_and_come_again(prepared):
    data = Reference(of(prepared))
    vocabulary = SimpleNamespace(classes=data.source.classes)
    objective = SimpleNamespace(text_encoder=None, vocabulary=vocabulary)
    labels, asked = [data.source[i]["label"] for i in range(6)], data.asked(15, objective)
    assert sorted(labels) == sorted(asked[:6]) and labels != asked[:6]
    assert asked == (asked[:6] * 3)[:15]


def on_hosts(monkeypatch, count, work):
    """What work() gives on each of so many processes, which are threads here."""
    here, barrier, shared = threading.local(), threading.Barrier(count), {}

    def gather(values):
        shared[here.index] = values
        barrier.wait(20)
        out = [np.stack(rows) for rows in zip(*(shared[i] for i in range(count)), strict=True)]
        barrier.wait(20)
        return out

    found = {}

    def run(index):
        here.index = index
        found[index] = work()

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: getattr(here, "index", 0))
    monkeypatch.setattr(reference, "multihost_utils", SimpleNamespace(process_allgather=gather))
    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_hosts_share_the_reading_and_all_find_what_one_alone_does(monkeypatch, count):
    data = Reference(tiny.config(**FIELDS | {"evaluation.samples": 29}))
    monkeypatch.setattr(reference, "PART", 4)  # 8 of them: the last hosts have less to do
    alone, chosen = reference.describe(network(), data, samples=7)
    read = []

    def noted(square, place):
        read.append(place)
        return original(square, place)

    original = reference.CenterCrop.__call__
    monkeypatch.setattr(reference.CenterCrop, "__call__", noted)
    for statistics, features in on_hosts(
        monkeypatch, count, lambda: reference.describe(network(), data, samples=7)
    ):
        np.testing.assert_array_equal(statistics.mean, alone.mean)
        np.testing.assert_array_equal(statistics.covariance, alone.covariance)
        np.testing.assert_array_equal(features, chosen)
    assert sorted(read) == list(range(29)) and alone.count == 29


def test_its_moments_are_those_of_its_squares():
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
        _, some = reference.describe(network(), data, samples=2)
    assert read.call_args.args[1] == 3
    rows = [np.flatnonzero((features == row).all(1)).tolist() for row in some]
    assert len(rows) == 2 and rows[0] < rows[1] and rows != [[0], [1]]


def test_broken_pictures_are_left_out(prepared):
    data = Reference(of(prepared))
    first = data.source._record

    def broken(i):
        if i in (0, 3):
            raise ValueError("no picture")
        return first(i)

    with mock.patch.object(data.source, "_record", broken):
        statistics, features = reference.describe(network(), data, samples=6)
        assert statistics.count == len(features) == 4  # not their neighbours twice
        ((places, found),) = data.features(network())
    np.testing.assert_array_equal(places, [1, 2, 4, 5])
    np.testing.assert_array_equal(found, features)
    with mock.patch.object(data.source, "_record", side_effect=ValueError("no picture")):
        data.source._reset()
        with pytest.raises(ConfigError, match="evaluation.path: .* no decodable train image"):
            reference.describe(network(), data)


def test_it_is_known_by_its_files_wherever_they_are(prepared, tmp_path):
    one = Reference(of(prepared)).digest()
    shutil.copytree(prepared, tmp_path / "copy")
    assert Reference(of(str(tmp_path / "copy"))).digest() == one
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), np.uint8)
    other = str(make(tmp_path, [*GREY[:5], noise]))
    assert Reference(of(other)).digest() != one
    assert Reference(of(prepared, **{"data.resolution": 32})).digest() != one
    assert Reference(of(prepared)).digest("a network") != one
    record = tiny.evaluation(of(prepared)).identity["evaluation"]
    assert record["path"] == prepared and record["reference_sha256"] == one
    # Of an evaluation it says with what was compared, and who was asked for.
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
        made = tiny.config(**FIELDS | {f"data.{name}": value for name, value in change.items()})
        assert Reference(made).digest() != Reference(tiny.config(**FIELDS)).digest()


def test_mode_reference_writes_what_fid_compares_with(tmp_path, capsys, request):
    path = str(tmp_path / "out" / "reference.npz")
    config = tiny.config(**FIELDS | {"evaluation.statistics": path})
    image_quality.run_reference(config)
    assert "over 9 pictures" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["reference.npz"]
    killed = mock.patch.object(np, "savez", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        statistics = fid.load(path)
        statistics.save(path)  # what was there stays whole
    statistics = fid.load(path)
    assert statistics.sha256 == "sha of 1.0" and statistics.resolution == (16, 16)
    image_quality.run_reference(config)
    assert "Nothing to do" in capsys.readouterr().out
    for other in ({"evaluation.reference": "train"}, {"evaluation.samples": 8}):
        with pytest.raises(ConfigError, match="is there, but not of these pictures"):
            image_quality.run_reference(dataclasses.replace(tiny.config(**FIELDS | other | {
                "evaluation.statistics": path
            })))  # fmt: skip
    for samples, warnings in ((6, 1), (7, 0)):  # pictures for the network's 6 features
        some = {"evaluation.samples": samples, "evaluation.statistics": f"{path}-{samples}.npz"}
        with mock.patch.object(image_quality.logging, "warning") as warned:
            image_quality.run_reference(tiny.config(**FIELDS | some))
        assert warned.call_count == warnings
    metrics = {"evaluation.metrics": ("fid",)}
    expected = measure(tmp_path / "computed", Fake(tiny.config(**FIELDS | metrics)))
    given = tiny.config(**FIELDS | metrics | {"evaluation.statistics": path})
    with mock.patch.object(reference, "describe", side_effect=AssertionError):
        assert measure(tmp_path / "given", Fake(given)) == pytest.approx(expected)
    both = {"evaluation.metrics": ("fid", "frechet_shapes")}
    request.getfixturevalue("small")["shapes"] = network(
        3.0
    )  # of that network there are no statistics to be given
    values = measure(tmp_path / "both", Fake(dataclasses.replace(given, evaluation=(
        tiny.config(**FIELDS | both | {"evaluation.statistics": path}).evaluation
    ))))  # fmt: skip
    assert values["frechet_shapes"] == pytest.approx(9 * expected["fid"], rel=1e-4)
    dataclasses.replace(statistics, sha256="other" * 5).save(path)
    with pytest.raises(ConfigError, match="evaluation.statistics: the reference is of means"):
        tiny.evaluation(given)  # before any picture is made
    with pytest.raises(ConfigError, match="evaluation.statistics: the reference is of means"):
        measure(tmp_path / "other", Fake(given))
    dataclasses.replace(statistics, resolution=(32, 32)).save(path)
    with pytest.raises(ConfigError, match="pictures of 32 x 32 pixels, not 16 x 16"):
        tiny.evaluation(given)
    with pytest.raises(ConfigError, match="evaluation.statistics: empty"):
        image_quality.run_reference(tiny.config(**FIELDS))
