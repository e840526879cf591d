"""Image quality: shared and resumed generation of images, caching, and the right reference."""

import dataclasses
import json
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from PIL import Image

from condiff_jax.config.errors import ConfigError
from condiff_jax.data import augment, shapes
from condiff_jax.evaluation import (
    controllability,
    evaluate,
    feature_networks,
    image_quality,
    protocols,
    reference,
)
from condiff_jax.evaluation.metrics.clip_score import ClipScore
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.evaluation.records import describe, measurement_dir, summary
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import sampler
from condiff_jax.sampling.requests import control_values, guidance_scale
from condiff_jax.training.reporters.diffusion import Reporter
from tests import tiny

METRICS = ("fid", "kid", "precision_recall", "clip_score")
FIELDS = {
    "evaluation.metrics": METRICS,
    "evaluation.samples": 9,
    "evaluation.reference": "validation",
    "sampling.batch_size": 8,
}


def means(params, images):
    """Compute features (B, 6): the mean colors of an image's upper and lower half."""
    halves = images.astype(jnp.float32).reshape(len(images), 2, -1, 3) / 255
    return params * halves.mean(2).reshape(len(images), 6)


def network(scale=1.0):
    return FeatureNetwork("means", f"sha of {scale}", 6, np.float32(scale), means)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Replace Inception and CLIP by small networks, and use small parts."""

    def embed_captions(captions):
        return np.eye(6, dtype=np.float32)[[len(caption) % 6 for caption in captions]]

    networks = {"inception": network(), "clip": ClipScore(network(), embed_captions)}

    def load_network(config, name):
        if name == "inception":
            return feature_networks.resized(networks[name], config.evaluation.resize)
        return networks[name]

    monkeypatch.setattr(image_quality, "load_network", load_network)
    monkeypatch.setattr(image_quality, "PART", 4)
    return networks


class Fake:
    """Sampler of random images that depend on the sample index; it may be killed at an index."""

    def __init__(self, config, dies_at=None):
        self.objective, self.calls, self.dies_at = tiny.objective(config), [], dies_at
        self.mesh = sharding.create_mesh()

    def __call__(self, params, batch, *, first=0, label=""):
        if self.dies_at is not None and first >= image_quality.FIRST_INDEX + self.dies_at:
            raise KeyboardInterrupt
        self.calls.append((first - image_quality.FIRST_INDEX, batch["ids"]))
        return np.stack([random_image(first + i) for i in range(len(batch["ids"]))])


def random_image(i):
    return np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)


def measure(path, fake, parts="parts"):
    evaluation = tiny.evaluation(fake.objective.config, path)
    return image_quality.measure(evaluation, fake, {}, epath.Path(path) / parts)[0]


def test_a_killed_generation_resumes(tmp_path):
    config = tiny.config(**FIELDS)
    uninterrupted = Fake(config)
    expected = measure(tmp_path / "whole", uninterrupted)
    assert [call[0] for call in uninterrupted.calls] == [0, 4, 8]
    assert set(expected) == {
        "fid", "fid_rank_deficient", "kid", "kid_std", "precision", "recall", "clip_score",
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Fake(config, dies_at=8))
    resumed = Fake(config)
    assert measure(tmp_path, resumed) == expected
    assert [call[0] for call in resumed.calls] == [8]
    np.testing.assert_array_equal(resumed.calls[0][1], uninterrupted.calls[2][1])


def test_metrics_do_not_depend_on_the_other_metrics(tmp_path):
    expected = measure(tmp_path, Fake(tiny.config(**FIELDS)))
    for metric in METRICS:
        fake = Fake(tiny.config(**FIELDS | {"evaluation.metrics": (metric,)}))
        values = measure(tmp_path, fake, metric)
        assert values == {name: expected[name] for name in values} and values


@pytest.mark.parametrize("metric", ["kid", "precision_recall"])
def test_generated_features_are_the_first_argument_of_a_metric(tmp_path, metric):
    fake = Fake(tiny.config(**FIELDS | {"evaluation.metrics": (metric,)}))
    with mock.patch.object(getattr(image_quality, metric), metric, return_value={}) as function:
        measure(tmp_path, fake)
    images = np.stack([random_image(image_quality.FIRST_INDEX + i) for i in range(9)])
    np.testing.assert_allclose(function.call_args.args[0], network()(images), rtol=1e-6)


def test_kid_draws_subsets_where_there_are_enough(tmp_path, monkeypatch):
    config = tiny.config(**FIELDS | {"evaluation.metrics": ("kid",)})
    assert measure(tmp_path / "all", Fake(config))["kid_std"] < 1e-9  # all subsets are equal
    monkeypatch.setattr(image_quality.kid, "SIZE", 5)
    assert measure(tmp_path / "five", Fake(config))["kid_std"] > 1e-6


def test_sizes_are_drawn_from_those_of_training(tmp_path):
    fake, folder = Fake(tiny.config(**FIELDS | {"sampling.size": "train"})), Workdir(str(tmp_path))
    seen = np.arange(64, dtype=np.float32).reshape(8, 8) + 1
    folder.save_control(seen)
    with mock.patch.object(Fake, "__call__", side_effect=Fake.__call__, autospec=True) as call:
        measure(tmp_path, fake)
    batches = [arguments.args[2] for arguments in call.call_args_list]
    heights = np.concatenate([batch["control"]["height"] for batch in batches])
    expected = control_values(fake.objective.config, 9, first=image_quality.FIRST_INDEX, seen=seen)
    np.testing.assert_array_equal(heights, expected["height"])


def test_only_the_first_host_writes(tmp_path, monkeypatch):
    fields = {"evaluation.metrics": ("kid", "size_response"), "evaluation.save": "npz"}
    fields |= {"evaluation.size_prompts": 5}
    monkeypatch.setattr(controllability, "SIZE_PART", 2)
    fake = Fake(tiny.config(**FIELDS | fields))
    monkeypatch.setattr(reference, "PART", 4)
    with monkeypatch.context() as other:
        other.setattr(jax, "process_index", lambda: 1)
        other.setattr(jax, "process_count", lambda: 2)
        gather = SimpleNamespace(
            process_allgather=lambda arrays: [np.stack([a, a]) for a in arrays]
        )
        other.setattr(reference, "multihost_utils", gather)
        other.setattr(reference, "barrier", lambda name: None)
        measure(tmp_path, fake)
        # Generated images use the devices of all hosts, reference data those of each host.
        evaluation = tiny.evaluation(fake.objective.config, tmp_path)
        assert {network.mesh for network in evaluation.networks.values()} == {fake.mesh}
        local = {network.mesh for network in evaluation.local_networks.values()}
        assert local == {sharding.local_mesh()}
        assert not list(tmp_path.iterdir())
        record = evaluation.measure(fake, {}, 2)
        assert record["metrics"] and not list(tmp_path.iterdir())
    measure(tmp_path, fake)
    parts = epath.Path(tmp_path / "parts")
    before = {file.name for file in parts.iterdir()}
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    image_quality.delete_parts(parts)
    assert {file.name for file in parts.iterdir()} == before


def test_parts_of_other_networks_are_sampled_again(tmp_path):
    measure(tmp_path, Fake(tiny.config(**FIELDS | {"evaluation.metrics": ("fid",)})))
    repeated = Fake(tiny.config(**FIELDS))
    measure(tmp_path, repeated)
    assert len(repeated.calls) == 3


def test_images_of_the_reference_have_no_distance(tmp_path):
    config = tiny.config(**FIELDS)
    source = shapes.Shapes("validation", config.data.sizes)
    rows = [source[i] for i in range(9)]
    images = np.stack([augment.center(row["image"], 16) for row in rows])
    objective = tiny.objective(config)
    ids = [objective.encode_text(row["caption"])[0] for row in rows]

    def return_reference(params, batch, *, first=0, label=""):
        low = first - image_quality.FIRST_INDEX
        np.testing.assert_array_equal(batch["ids"], ids[low : low + len(batch["ids"])])
        return images[low : low + len(batch["ids"])]

    fake = mock.Mock(side_effect=return_reference, objective=objective, mesh=None)
    values = measure(tmp_path, fake)
    assert values["fid"] == pytest.approx(0, abs=1e-6) and values["fid_rank_deficient"] is False
    assert values["precision"] == values["recall"] == 1
    features = np.asarray(means(1.0, images))
    cosines = [f[len(row["caption"]) % 6] for f, row in zip(features, rows, strict=True)]
    cosines = np.array(cosines) / np.linalg.norm(features, axis=1)
    assert values["clip_score"] == pytest.approx(100 * cosines.mean(), rel=1e-4)


def test_features_of_the_reference_are_cached(tmp_path, small):
    config = tiny.config(**FIELDS)
    first = measure(tmp_path, Fake(config))
    with mock.patch.object(reference, "describe", side_effect=AssertionError):
        assert measure(tmp_path, Fake(config)) == first
    small["inception"] = network(2.0)  # other weights
    other = Fake(tiny.config(**FIELDS | {"evaluation.metrics": ("fid",)}))
    values = measure(tmp_path, other, "others")
    assert values["fid"] == pytest.approx(4 * first["fid"], rel=1e-3)


def color_statistics(params, images):
    """Compute features (B, 6): means and deviations of an image's colors, at any size."""
    x = images.astype(jnp.float32) / 255
    return params * jnp.concatenate([x.mean((1, 2)), x.std((1, 2))], -1)


def test_another_resizing_is_another_network(tmp_path, small):
    """Reference statistics are computed again, records differ, and statistics do not mix."""
    small["inception"] = FeatureNetwork("colors", "sha", 6, np.float32(1), color_statistics)
    fields = FIELDS | {"evaluation.metrics": ("fid",)}
    tf, clean = (tiny.config(**fields | {"evaluation.resize": how}) for how in ("tf", "clean"))
    values = [tiny.evaluation(c, tmp_path).measure(Fake(c), {}, 2) for c in (tf, clean)]
    assert len(list((tmp_path / "references").iterdir())) == 2
    plain = {"name": "colors", "sha256": "sha"}
    assert [v["features"]["inception"] for v in values] == [plain, plain | {"resize": "clean"}]
    first, second = (v["metrics"]["fid"] for v in values)
    assert abs(first - second) > 0.01 * first  # resizing with smoothing changes noise
    statistics = {"evaluation.statistics": str(tmp_path / "clean.npz")}
    image_quality.run_reference(tiny.config(**fields | statistics | {"evaluation.resize": "clean"}))
    tiny.evaluation(tiny.config(**fields | statistics | {"evaluation.resize": "clean"}))
    with pytest.raises(ConfigError, match="evaluation.statistics: .*resize=clean, not tf"):
        tiny.evaluation(tiny.config(**fields | statistics))


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[:100], lambda b: b[:-30]])
def test_contents_of_damaged_cache_files_are_computed_again(tmp_path, damage):
    config = tiny.config(**FIELDS)
    expected = measure(tmp_path, Fake(config))
    files = [tmp_path / "parts/00000004-4.npz", *(tmp_path / "references").iterdir()]
    assert len(files) == 3  # a part; moments and features of the reference
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    repeated = Fake(config)
    assert measure(tmp_path, repeated) == expected
    assert [call[0] for call in repeated.calls] == [4]


@pytest.mark.parametrize("name", ["inception", "clip"])
def test_non_finite_features_are_an_error_of_their_network(tmp_path, small, name):
    fields = {"evaluation.metrics": ("fid",) if name == "inception" else ("clip_score",)}
    broken = {"inception": network(np.nan), "clip": ClipScore(network(0.0), small["clip"].texts)}
    with mock.patch.dict(small, broken), pytest.raises(ConfigError, match=f"evaluation.{name}: "):
        measure(tmp_path, Fake(tiny.config(**FIELDS | fields)))


@pytest.mark.parametrize("save", ["png", "npz"])
def test_images_are_saved_in_order_of_their_indices(tmp_path, save):
    fields = FIELDS | {"evaluation.metrics": ("fid",), "evaluation.save": save}
    config = tiny.config(**fields)
    parts, other = epath.Path(tmp_path / "parts"), {"png": "npz", "npz": "png"}[save]
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Fake(config, dies_at=4))
    assert not image_quality.saved(parts, config)
    measure(tmp_path, Fake(tiny.config(**fields | {"evaluation.save": other})))
    measure(tmp_path, Fake(config))
    image_quality.delete_parts(parts)
    for method in (save, other):
        assert image_quality.saved(parts, tiny.config(**fields | {"evaluation.save": method}))
    expected = np.stack([random_image(image_quality.FIRST_INDEX + i) for i in range(9)])
    if save == "png":
        files = sorted((parts / "pictures").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(9)]
        images = np.stack([np.asarray(Image.open(file)) for file in files])
    else:
        (parts / "raw").mkdir()  # as if killed before the last raw file was deleted
        (parts / "raw/00000008.raw").write_bytes(b"last")
        image_quality._join_raw(parts, (9, 16, 16, 3))
        assert {file.name for file in parts.iterdir()} == {"pictures", "pictures.npz"}
        with np.load(parts / "pictures.npz") as arrays:
            images = arrays["arr_0"]
    np.testing.assert_array_equal(images, expected)


def test_a_recorded_measurement_leaves_no_parts(tmp_path):
    config = tiny.config(**FIELDS)
    evaluation = tiny.evaluation(config, tmp_path)
    parts = measurement_dir(evaluation.folder, evaluation.identity | {"step": 2})
    parts.mkdir(parents=True)
    (parts / "00000000-4-png.npz.tmp").write_bytes(b"killed")
    record = evaluation.measure(Fake(config), {}, 2)
    assert record["metrics"]["fid"] > 0
    assert not list((tmp_path / "evaluations").iterdir())
    assert record["features"] == {
        name: {"name": "means", "sha256": "sha of 1.0"} for name in ("clip", "inception")
    }
    (line,) = summary(record)[:1]
    assert line.startswith("means, 9 images against validation: fid")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"evaluation.reference": "train_200k"},
            "evaluation.reference: data.name=shapes has no train_200k",
        ),
        ({"evaluation.samples": 10_001}, "has 10000 images"),
        (
            {"evaluation.metrics": ("frechet_shapes",), "data.name": "tfds"},
            "evaluation.metrics: frechet_shapes need",
        ),
        ({"evaluation.path": "/no/such"}, "evaluation.path: "),
        ({"evaluation.statistics": "/no/such.npz"}, "evaluation.statistics: .* does not exist"),
        ({"evaluation.samples": 3}, "evaluation.samples: the metrics need 4 images or more, got 3"),
        ({"data.semantics": "class", "model.name": "dit_ln"}, "clip_score needs"),
    ],
)
def test_bad_configs(fields, message):
    with pytest.raises(ConfigError, match=message):
        tiny.evaluation(tiny.config(**FIELDS | fields))


def test_statistics_are_read_for_inception_only():
    fields = {"evaluation.metrics": ("clip_score",), "evaluation.statistics": "/no/such.npz"}
    config = tiny.config(**FIELDS | fields)
    assert "statistics" not in tiny.evaluation(config).identity["evaluation"]


def test_statistics_are_described_by_their_content(tmp_path):
    identities = []
    for name, content in {"a": b"one", "b": b"one", "c": b"other"}.items():
        (tmp_path / name).write_bytes(content)
        config = tiny.config(**FIELDS | {"evaluation.statistics": str(tmp_path / name)})
        identities.append(describe(config, {"inception": network()}, None)["evaluation"])
    assert identities[0] == identities[1] != identities[2]


def test_missing_networks_are_named(monkeypatch):
    monkeypatch.undo()
    for field in ("inception", "clip"):
        metric = {"inception": "fid", "clip": "clip_score"}[field]
        config = tiny.config(**{"evaluation.metrics": (metric,)})
        with pytest.raises(ConfigError, match=f"evaluation.{field}: no path to .*; give "):
            tiny.evaluation(config)


def test_protocols_set_the_fields_of_the_paper_and_keep_the_rest():
    config = tiny.config(
        **FIELDS | {"evaluation.protocol": "imagenet_fid50k", "data.resolution": 512}
    )
    applied = protocols.apply(config)
    assert applied.sampling.steps == 250 and applied.sampling.size == "train"
    assert guidance_scale(applied.sampling, 512) == 2
    assert applied.evaluation.metrics == ("fid",) and applied.evaluation.reference == "train"
    assert applied.evaluation.samples == 9
    assert protocols.apply(tiny.config()) == tiny.config()
    line = protocols.summary(config)
    assert (
        "sets sampling.sampler=ddim, sampling.guidance=1.5, sampling.base_resolution=256 (not 0)"
        in line
    )
    assert "sampling.steps=250 (not 3)" in line and line.endswith("evaluation.samples stays 9")


@pytest.mark.parametrize(
    ("name", "steps", "metric", "reference", "guidance", "size"),
    [
        ("imagenet_fid50k", 250, "fid", "train", 2, "train"),
        ("val_fid", 50, "fid", "validation", 2, "train"),
        ("coco_clip", 25, "clip_score", "coco", 5, "train"),
        ("lpips_size", 7, "size_response", "train_200k", 7, "fixed"),
    ],
)
def test_protocols_are_the_papers(name, steps, metric, reference, guidance, size):
    others = {"sampling.sampler": "ddpm", "sampling.steps": 7, "sampling.guidance": 7.0}
    others |= {"evaluation.reference": "train_200k", "evaluation.path": "somewhere"}
    applied = protocols.apply(tiny.config(**{"evaluation.protocol": name} | others))
    assert applied.sampling.sampler == "ddim" and applied.sampling.steps == steps
    assert guidance_scale(applied.sampling, 512) == guidance
    assert applied.evaluation.metrics == (metric,) and applied.evaluation.reference == reference
    assert applied.sampling.size == size and applied.evaluation.path == "somewhere"


def test_mode_evaluate_applies_the_protocol_and_prints_its_fields(tmp_path, capsys):
    config = tiny.config(**{"evaluation.protocol": "coco_clip"})
    with pytest.raises(ConfigError, match="evaluation.path: evaluation.reference=coco needs"):
        evaluate.run(config, str(tmp_path))
    assert "evaluation.protocol=coco_clip sets sampling.sampler=ddim" in capsys.readouterr().out


def test_a_grid_is_measured_point_by_point(tmp_path, monkeypatch, capsys):
    config = tiny.config(
        **FIELDS | {"evaluation.metrics": ("fid",), "evaluation.grid": "guidance=1,2.5; steps=2"}
    )
    points = evaluate.grid(config)
    assert list(points) == ["guidance 1.0, steps 2", "guidance 2.5, steps 2"]
    settings = [(point.sampling.guidance, point.sampling.steps) for point in points.values()]
    assert settings == [(1, 2), (2.5, 2)]
    checkpoints = mock.Mock(latest=2)
    checkpoints.restore_params.return_value = (2, {})
    monkeypatch.setattr("condiff_jax.runs.run.Checkpoints", lambda *_: checkpoints)
    monkeypatch.setattr(sampler.Sampler, "__call__", Fake(config).__call__)
    folder = Workdir(str(tmp_path))
    folder.open(config, tiny.objective(config).vocabulary)
    records = evaluate.run(config, str(tmp_path))
    assert [record["sampling"]["guidance"] for record in records] == [1, 2.5]
    assert [json.loads(line) for line in folder.evaluation.open()] == records
    assert checkpoints.restore_params.call_count == 1
    assert "guidance 2.5, steps 2:" in capsys.readouterr().out
    assert evaluate.run(config, str(tmp_path)) == records
    assert checkpoints.restore_params.call_count == 1
    evaluation = dataclasses.replace(config.evaluation, save="png")  # no images are saved yet
    saving = dataclasses.replace(config, evaluation=evaluation)
    for calls in (2, 2):
        evaluate.run(saving, str(tmp_path))
        assert checkpoints.restore_params.call_count == calls
    files = sorted((tmp_path / "evaluations").glob("2-*/pictures/000008.png"))
    assert len(files) == 2
    files[0].unlink()  # as if killed before it was saved: all of this point are sampled again
    evaluate.run(saving, str(tmp_path))
    assert checkpoints.restore_params.call_count == 3 and files[0].exists()
    assert len(list(folder.evaluation.open())) == 5
    for bad in ("guidance", "speed=1", "steps=1.5", "prompts="):
        evaluation = dataclasses.replace(config.evaluation, grid=bad)
        with pytest.raises(ConfigError, match="evaluation.grid"):
            evaluate.grid(dataclasses.replace(config, evaluation=evaluation))


def test_evaluations_in_training_use_fewer_images(tmp_path, monkeypatch):
    fields = {"evaluation.metrics": ("fid",), "evaluation.every_samples": 5}
    config = tiny.config(**FIELDS | fields)
    monkeypatch.setattr(sampler.Sampler, "__call__", Fake(config).__call__)
    folder = Workdir(str(tmp_path))
    evaluation = tiny.evaluation(config, tmp_path)
    reporter = Reporter(tiny.objective(config), sharding.create_mesh(), folder, {}, evaluation)
    reporter.evaluate_early(3, {})
    reporter.evaluate_early(3, {})  # recorded already
    reporter.finish(4, {})
    lines = [json.loads(line) for line in folder.evaluation.open()]
    assert [(line["step"], line["evaluation"]["samples"]) for line in lines] == [(3, 5), (4, 9)]


def test_images_are_saved_for_image_quality_only(tmp_path):
    """Other metrics save no images, and are not measured again for missing ones."""
    fields = FIELDS | {"evaluation.save": "png", "evaluation.metrics": ("prompt_accuracy",)}
    assert image_quality.saved(tmp_path, tiny.config(**fields))
    assert not image_quality.saved(
        tmp_path, tiny.config(**fields | {"evaluation.metrics": METRICS})
    )
    assert image_quality.saved(tmp_path, tiny.config(**FIELDS))


def test_a_resumed_run_deletes_later_measurements(tmp_path):
    folder, config = Workdir(str(tmp_path)), tiny.config(**FIELDS)
    for step in (2, 4, 10):
        (tmp_path / f"evaluations/{step}-abc").mkdir(parents=True)
        (tmp_path / f"evaluations/{step}-abc/00000000-4.npz").write_bytes(b"features")
    evaluation = tiny.evaluation(config, tmp_path)
    Reporter(tiny.objective(config), sharding.create_mesh(), folder, {}, evaluation, first=4)
    assert sorted(path.name for path in (tmp_path / "evaluations").iterdir()) == ["2-abc", "4-abc"]
