"""Distributions: one generation for all metrics, resumed, kept, compared with the right data."""

import dataclasses
import json
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from condiff_jax import evaluate, fidelity, protocols, sample, sharding
from condiff_jax.config import ConfigError
from condiff_jax.data import augment, shapes
from condiff_jax.data.builders.prepare import prepare
from condiff_jax.logs import Reporter
from condiff_jax.metrics import fid
from condiff_jax.metrics.clip_score import ClipScore
from condiff_jax.metrics.features import FeatureNetwork
from condiff_jax.workdir import Workdir
from tests import tiny

METRICS = ("fid", "kid", "precision_recall", "clip_score")
FIELDS = {
    "evaluation.metrics": METRICS,
    "evaluation.samples": 9,
    "evaluation.reference": "validation",
    "sampling.batch_size": 8,
}


def means(params, images):
    """Features (B, 6): the mean colours of a picture's upper and lower half."""
    halves = images.astype(jnp.float32).reshape(len(images), 2, -1, 3) / 255
    return params * halves.mean(2).reshape(len(images), 6)


def network(scale=1.0):
    return FeatureNetwork("means", f"sha of {scale}", 6, np.float32(scale), means)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Small networks in place of Inception and CLIP, and small parts."""
    texts = lambda captions: np.eye(6, dtype=np.float32)[[len(c) % 6 for c in captions]]  # noqa: E731
    found = {"inception": network(), "clip": ClipScore(network(), texts)}
    monkeypatch.setattr(fidelity, "_network", lambda name, path: found[name])
    monkeypatch.setattr(fidelity, "PART", 4)
    return found


class Fake:
    """A sampler that draws a picture from the number of each sample; it may be killed."""

    def __init__(self, config, dies_at=None):
        self.system, self.calls, self.dies_at = tiny.system(config), [], dies_at
        self.mesh = sharding.create_mesh()

    def __call__(self, params, batch, *, first=0, label=""):
        if self.dies_at is not None and first >= fidelity.FIRST_INDEX + self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((first - fidelity.FIRST_INDEX, batch["ids"]))
        return np.stack([picture(first + i) for i in range(len(batch["ids"]))])


def picture(i):
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def measure(path, fake):
    return fidelity.measure(fake, {}, Workdir(str(path)), path / "parts")


def test_a_killed_generation_goes_on_where_it_was(tmp_path):
    config = tiny.config(**FIELDS)
    whole = Fake(config)
    expected = measure(tmp_path / "whole", whole)
    assert [call[0] for call in whole.calls] == [0, 4, 8]
    assert set(expected) == {
        "fid", "fid_rank_deficient", "kid", "kid_std", "precision", "recall", "clip_score",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Fake(config, dies_at=8))
    again = Fake(config)
    assert measure(tmp_path, again) == expected
    assert [call[0] for call in again.calls] == [8]
    np.testing.assert_array_equal(again.calls[0][1], whole.calls[2][1])


def test_parts_of_other_networks_are_made_again(tmp_path):
    measure(tmp_path, Fake(tiny.config(**FIELDS | {"evaluation.metrics": ("fid",)})))
    again = Fake(tiny.config(**FIELDS))
    measure(tmp_path, again)
    assert len(again.calls) == 3


def test_the_references_own_pictures_are_at_no_distance(tmp_path):
    config = tiny.config(**FIELDS)
    source = shapes.Shapes("validation", config.data.sizes)
    rows = [source[i] for i in range(9)]
    pictures = np.stack([augment.center(row["image"], 16)[0] for row in rows])
    fake = Fake(config)
    asked = [fake.system.encode_text(row["caption"])[0] for row in rows]

    def own(params, batch, *, first=0, label=""):
        low = first - fidelity.FIRST_INDEX
        np.testing.assert_array_equal(batch["ids"], asked[low : low + len(batch["ids"])])
        return pictures[low : low + len(batch["ids"])]

    values = measure(tmp_path, mock.Mock(side_effect=own, system=fake.system, mesh=None))
    assert values["fid"] == pytest.approx(0, abs=1e-6) and values["fid_rank_deficient"] is False
    assert values["precision"] == values["recall"] == 1
    features = np.asarray(means(1.0, pictures))
    cosines = [f[len(row["caption"]) % 6] for f, row in zip(features, rows, strict=True)]
    cosines = np.array(cosines) / np.linalg.norm(features, axis=1)
    assert values["clip_score"] == pytest.approx(100 * cosines.mean(), rel=1e-4)


def test_features_of_the_reference_are_kept_and_used_again(tmp_path, small):
    config = tiny.config(**FIELDS)
    first = measure(tmp_path, Fake(config))
    with mock.patch.object(fidelity, "describe", side_effect=AssertionError):
        assert measure(tmp_path, Fake(config)) == first
    small["inception"] = network(2.0)  # other weights
    other = Fake(tiny.config(**FIELDS | {"evaluation.metrics": ("fid",)}))
    values = fidelity.measure(other, {}, Workdir(str(tmp_path)), tmp_path / "others")
    assert values["fid"] == pytest.approx(4 * first["fid"], rel=1e-3)


@pytest.mark.parametrize("save", ["png", "npz"])
def test_pictures_are_kept_in_order_of_their_numbers(tmp_path, save):
    fields = FIELDS | {"evaluation.metrics": ("fid",), "evaluation.save": save}
    config = tiny.config(**fields)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Fake(config, dies_at=4))
    measure(tmp_path, Fake(config))
    parts = tmp_path / "parts"
    fidelity.forget(parts)
    expected = np.stack([picture(fidelity.FIRST_INDEX + i) for i in range(9)])
    if save == "png":
        files = sorted((parts / "pictures").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(9)]
        found = np.stack([np.asarray(Image.open(file)) for file in files])
    else:
        assert [file.name for file in parts.iterdir()] == ["pictures.npz"]
        (parts / "pictures").mkdir()  # as when killed before the last of them was removed
        (parts / "pictures/00000008.raw").write_bytes(b"last")
        fidelity._join(parts, (9, 16, 16, 3))
        assert [file.name for file in parts.iterdir()] == ["pictures.npz"]
        with np.load(parts / "pictures.npz") as arrays:
            found = arrays["arr_0"]
    np.testing.assert_array_equal(found, expected)


def test_a_recorded_measurement_leaves_no_parts(tmp_path):
    config = tiny.config(**FIELDS)
    record = evaluate.measure(Fake(config), {}, 2, Workdir(str(tmp_path)), ema=True)
    assert record["metrics"]["fid"] > 0
    assert not list((tmp_path / "evaluations").iterdir())
    assert record["features"] == {
        name: {"name": "means", "sha256": "sha of 1.0"} for name in ("clip", "inception")
    }
    (line,) = evaluate.summary(record)[:1]
    assert line.startswith("means, 9 pictures against validation: fid")


def test_mode_reference_writes_what_fid_compares_with(tmp_path, capsys):
    path = str(tmp_path / "out" / "reference.npz")
    config = tiny.config(**FIELDS | {"evaluation.statistics": path})
    fidelity.run_reference(config)
    assert "over 9 pictures" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["reference.npz"]
    killed = mock.patch.object(np, "savez", side_effect=KeyboardInterrupt)
    with killed, pytest.raises(KeyboardInterrupt):
        statistics = fid.load(path)
        statistics.save(path)  # what was there stays whole
    statistics = fid.load(path)
    assert statistics.sha256 == "sha of 1.0" and statistics.resolution == (16, 16)
    fidelity.run_reference(config)
    assert "Nothing to do" in capsys.readouterr().out
    metrics = {"evaluation.metrics": ("fid",)}
    expected = measure(tmp_path / "computed", Fake(tiny.config(**FIELDS | metrics)))
    given = tiny.config(**FIELDS | metrics | {"evaluation.statistics": path})
    with mock.patch.object(fidelity, "describe", side_effect=AssertionError):
        assert measure(tmp_path / "given", Fake(given)) == pytest.approx(expected)
    dataclasses.replace(statistics, sha256="other" * 5).save(path)
    with pytest.raises(ConfigError, match="evaluation.statistics: the reference is of means"):
        measure(tmp_path / "other", Fake(given))
    with pytest.raises(ConfigError, match="evaluation.statistics is empty"):
        fidelity.run_reference(tiny.config(**FIELDS))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A TFDS data set of 6 pictures: two classes, by the builder for folders."""
    folder = tmp_path_factory.mktemp("prepared")
    for i in range(6):
        place = folder / "in" / f"class {i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((20, 24, 3), 40 * i, np.uint8)).save(place / f"{i}.png")
    prepare("folder", folder / "in", folder / "out", processes=1)
    return str(folder / "out")


def test_a_reference_can_be_another_data_set(prepared, monkeypatch):
    fields = FIELDS | {"evaluation.path": prepared, "evaluation.reference": "train"}
    reference = fidelity.Reference(tiny.config(**fields))
    (pictures,) = reference.pictures()
    assert sorted(pictures[:, 0, 0, 0]) == [0, 40, 80, 120, 160, 200]
    monkeypatch.setattr(fidelity, "SUBSET", 4)
    some = fidelity.Reference(tiny.config(**fields | {"evaluation.reference": "train_200k"}))
    assert len(some.numbers) == 4 and len(set(some.numbers)) == 4
    classes = tiny.config(**fields | {"data.semantics": "class", "model.name": "dit_ln"})
    with pytest.raises(ConfigError, match="classes of evaluation.path are not those"):
        fidelity.Reference(classes).asked(3, tiny.system(classes))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation.reference": "train_200k"}, "train_200k is not there for data.name=shapes"),
        ({"evaluation.samples": 10_001}, "has 10000 pictures"),
        (
            {"evaluation.metrics": ("frechet_shapes",), "data.name": "tfds"},
            "frechet_shapes of evaluation.metrics need data.name=shapes",
        ),
        ({"evaluation.path": "/no/such"}, "evaluation.path: "),
        ({"evaluation.statistics": "/no/such.npz"}, "evaluation.statistics: .* does not exist"),
        ({"data.semantics": "class", "model.name": "dit_ln"}, "clip_score of .* needs"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        evaluate.check(tiny.config(**FIELDS | fields))


def test_networks_that_are_not_there_are_named(monkeypatch):
    monkeypatch.undo()
    for field in ("inception", "clip"):
        metric = {"inception": "fid", "clip": "clip_score"}[field]
        config = tiny.config(**{"evaluation.metrics": (metric,)})
        with pytest.raises(ConfigError, match=f"evaluation.{field}: no path to .*; give "):
            evaluate.check(config)


def test_protocols_set_what_the_paper_says_and_keep_the_rest():
    config = tiny.config(
        **FIELDS | {"evaluation.protocol": "imagenet_fid50k", "data.resolution": 512}
    )
    found = protocols.apply(config)
    assert found.sampling.steps == 250 and found.sampling.size == "train"
    assert sample.guidance_scale(found.sampling, 512) == 2
    assert found.evaluation.metrics == ("fid",) and found.evaluation.reference == "train"
    assert found.evaluation.samples == 9
    assert protocols.apply(tiny.config()) == tiny.config()
    for name in protocols.PROTOCOLS:
        path = {"evaluation.path": "somewhere"}
        found = protocols.apply(tiny.config(**{"evaluation.protocol": name} | path))
        if name == "coco_clip":
            assert found.sampling.steps == 25 and sample.guidance_scale(found.sampling, 512) == 5
        if name == "val_fid":
            assert found.sampling.steps == 50 and found.evaluation.reference == "validation"


def test_a_grid_is_measured_point_by_point(tmp_path, monkeypatch, capsys):
    config = tiny.config(
        **FIELDS | {"evaluation.metrics": ("fid",), "evaluation.grid": "guidance=1,2.5; size=fixed"}
    )
    points = evaluate.grid(config)
    assert list(points) == ["guidance 1.0, size fixed", "guidance 2.5, size fixed"]
    assert [point.sampling.guidance for point in points.values()] == [1, 2.5]
    checkpoints = mock.Mock(latest=2)
    checkpoints.restore_params.return_value = (2, {})
    monkeypatch.setattr(evaluate, "Checkpoints", lambda *_: checkpoints)
    monkeypatch.setattr(sample.Sampler, "__call__", Fake(config).__call__)
    folder = Workdir(str(tmp_path))
    folder.open(config, tiny.system(config).vocabulary)
    found = evaluate.run(config, str(tmp_path))
    assert [record["sampling"]["guidance"] for record in found] == [1, 2.5]
    assert [json.loads(line) for line in folder.evaluation.open()] == found
    assert checkpoints.restore_params.call_count == 1
    assert "guidance 2.5, size fixed:" in capsys.readouterr().out
    assert evaluate.run(config, str(tmp_path)) == found
    assert checkpoints.restore_params.call_count == 1
    settings = dataclasses.replace(config.evaluation, save="png")  # not there yet
    for calls in (2, 2):
        evaluate.run(dataclasses.replace(config, evaluation=settings), str(tmp_path))
        assert checkpoints.restore_params.call_count == calls
    assert len(list((tmp_path / "evaluations").glob("2-*/pictures/000008.png"))) == 2
    for bad in ("guidance", "speed=1", "steps=1.5", "prompts="):
        with pytest.raises(ConfigError, match="evaluation.grid"):
            evaluate.grid(dataclasses.replace(
                config, evaluation=dataclasses.replace(config.evaluation, grid=bad)
            ))  # fmt: skip


def test_evaluations_in_training_are_of_fewer_pictures(tmp_path, monkeypatch):
    fields = {"evaluation.metrics": ("fid",), "evaluation.every_samples": 5}
    config = tiny.config(**FIELDS | fields)
    monkeypatch.setattr(sample.Sampler, "__call__", Fake(config).__call__)
    folder = Workdir(str(tmp_path))
    reporter = Reporter(tiny.system(config), sharding.create_mesh(), folder, {})
    reporter.early(3, {})
    reporter.early(3, {})  # once is enough
    reporter.finish(4, {})
    lines = [json.loads(line) for line in folder.evaluation.open()]
    assert [(line["step"], line["evaluation"]["samples"]) for line in lines] == [(3, 5), (4, 9)]
