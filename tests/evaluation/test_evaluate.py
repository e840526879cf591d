"""Mode evaluate: every metric is measured once and recorded with everything that it depends on."""

import dataclasses
import json
from functools import partial
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from condiff_jax.conditioning import SCALARS
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import ControlValues, Sampling
from condiff_jax.data import augment, shapes
from condiff_jax.evaluation import controllability, evaluate, image_quality
from condiff_jax.evaluation.metrics import shapes_features
from condiff_jax.evaluation.metrics.prompt import sharpness
from condiff_jax.evaluation.records import describe, find_record, measurement_dir
from condiff_jax.evaluation.reference import Reference
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import sampler
from condiff_jax.sampling.requests import control_values
from condiff_jax.training.reporters.diffusion import Reporter
from tests import tiny

MEASURED = ("prompt_accuracy", "frechet_shapes", "size_response")  # need no published weights
FIELDS = {
    "steps": 2,
    "evaluation.metrics": MEASURED,
    "evaluation.prompts": 3,
    "evaluation.samples": 9,
    "evaluation.size_prompts": 2,
    "evaluation.sizes": (12, 16, 24),
    "sampling.batch_size": 8,
}
CLASS = {"data.semantics": "class", "data.classes": 30, "model.name": "dit_ln"}


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    with tiny.few_layers():
        yield


@pytest.fixture(scope="module", params=["text", "class"])
def trained(request, tmp_path_factory):
    """Return (folder, fields) of a finished run with random parameters, as after training."""
    fields = FIELDS | (CLASS if request.param == "class" else {})
    path, config = tmp_path_factory.mktemp(request.param), tiny.config(**fields)
    params, folder = tiny.finished(config, path), Workdir(str(path))
    evaluation = tiny.evaluation(config, folder.path)
    Reporter(tiny.objective(config), sharding.create_mesh(), folder, None, evaluation).finish(
        2, params
    )
    return path, fields


def records(path):
    return [json.loads(line) for line in (path / "evaluation.jsonl").read_text().splitlines()]


def no_sampling():
    return mock.patch.object(sampler.Sampler, "__call__", side_effect=AssertionError("sampled"))


def test_the_end_of_training_measures_and_records(trained):
    path, fields = trained
    record = records(path)[0]
    assert record["step"] == 2
    accuracies = {"colour", "shape", "all"}
    if "data.semantics" not in fields:
        accuracies |= {"position", "left_right"}
    metrics = record["metrics"]
    others = {"frechet_shapes", "size_l2", "size_l2_hr", "sharpness_response"}
    assert set(metrics) == accuracies | others | {f"sharpness_{n}" for n in (12, 16, 24)}
    assert all(0 <= metrics[name] <= 1 for name in accuracies)
    assert metrics["frechet_shapes"] > 0 and metrics["size_l2"] > 0
    assert record["features"]["shapes"]["sha256"] == shapes_features.sha256()
    assert record["sampling"]["ema"] is True and record["sampling"]["control"]["height"] == 16
    assert record["evaluation"] == {
        "metrics": sorted(MEASURED), "prompts": 3, "samples": 9, "reference": "train",
        "reference_sha256": Reference(tiny.config(**fields)).digest(),
        "size_prompts": 2, "sizes": [12, 16, 24],
    }  # fmt: skip
    assert set(record["pictures"]) == {"grid", "sizes", "flip"}
    for name in record["pictures"].values():
        assert name.startswith("samples/2-") and np.asarray(Image.open(path / name)).std() > 0


def test_a_second_time_nothing_is_sampled(trained, capsys):
    path, fields = trained
    with no_sampling():
        (record,) = evaluate.run(tiny.config(**fields), str(path))
        # Fields that do not affect the metrics do not change the evaluation's identity.
        (again,) = evaluate.run(tiny.config(**fields | {"sampling.n": 2, "steps": 3}), str(path))
    assert record == again == records(path)[0]
    out = capsys.readouterr().out
    assert "already measured" in out and "Prompt accuracy on 3 unseen prompts: colour" in out
    assert "Frechet distance on shapes features" in out and "size_l2_hr" in out


def test_another_setting_is_another_record(trained):
    path, fields = trained
    before = records(path)
    fields = fields | {"evaluation.metrics": ("prompt_accuracy",)}
    (record,) = evaluate.run(tiny.config(**fields, **{"sampling.guidance": 2.0}), str(path))
    assert records(path) == [*before, record]
    assert record["sampling"]["guidance"] == 2 and record["features"] is None
    assert not set(record["pictures"].values()) & set(before[0]["pictures"].values())
    for change in ({"sampling.ema": False}, {"sampling.seed": 1}, {"evaluation.prompts": 2}):
        config = tiny.config(**fields | change)
        assert tiny.evaluation(config, path).find(2) is None


def test_a_checkpoint_past_the_configured_step_is_an_error(trained):
    path, fields = trained
    with pytest.raises(ConfigError, match="has trained to step 2, past 1"):
        evaluate.run(tiny.config(**fields | {"steps": 1}), str(path))


def test_all_sizes_share_noise_and_metrics_do_not(tmp_path):
    """The calls of each metric, with a sampler that records them."""
    objective, calls = tiny.objective(tiny.config(**FIELDS)), []

    def sampler(params, batch, *, first=0, label=""):
        control = {name: values[0] for name, values in batch["control"].items()}
        calls.append((len(batch["label"]), first, control))
        return np.random.default_rng(0).integers(0, 255, (len(batch["label"]), 16, 16, 3), np.uint8)

    fake = mock.Mock(side_effect=sampler, objective=objective, mesh=None)
    record = tiny.evaluation(objective.config, tmp_path).measure(fake, {}, 2)
    assert record["metrics"]["size_l2"] == 0  # the same noise gives the same images
    accuracy, *variants, frechet = calls
    assert (accuracy[0], frechet[0], [call[0] for call in variants]) == (3, 9, [2] * 5)
    assert len({call[1] for call in variants}) == 1
    assert len({accuracy[1], frechet[1], variants[0][1]}) == 3
    assert [call[2]["height"] for call in variants] == [12, 16, 24, 16, 16]
    assert [call[2]["width"] for call in variants] == [12, 16, 24, 16, 16]
    assert [call[2]["flip"] for call in variants] == [0, 0, 0, 0, 1]


def test_samples_have_the_prompts_of_an_unseen_reference(tmp_path):
    """Images that equal the reference's own have a distance of 0."""
    for reference in ("train", "validation"):
        config = tiny.config(**FIELDS | {"evaluation.reference": reference})
        objective, start = tiny.objective(config), 2**30 if reference == "train" else 0
        source = shapes.Shapes(reference, config.data.sizes)
        rows = [source[start + i] for i in range(9)]
        ids = [objective.encode_text(row["caption"])[0] for row in rows]

        def sampler(params, batch, *, first=0, label="", rows=rows, ids=ids):
            np.testing.assert_array_equal(batch["ids"], ids)
            return np.stack([augment.center(row["image"], 16) for row in rows])

        fake = mock.Mock(side_effect=sampler, objective=objective, mesh=None)
        evaluation = tiny.evaluation(config, tmp_path)
        values, _ = image_quality.measure(evaluation, fake, {}, tmp_path / reference)
        assert values["frechet_shapes"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation.reference": "coco"}, "evaluation.path: evaluation.reference=coco"),
        ({"evaluation.reference": "validation", "evaluation.samples": 10_001}, "has 10000"),
        ({"evaluation.lpips": "/no/such.npz"}, "evaluation.lpips: .*does not exist"),
        ({"evaluation.metrics": ()}, "evaluation.metrics: empty"),
        ({"data.resolution": 8}, "data.resolution: must be at least 16"),
        ({}, "no run here"),
    ],
)
def test_bad_configs(fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        evaluate.run(tiny.config(**FIELDS | fields), str(tmp_path))


def test_lpips_weights_that_do_not_fit(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.zeros(3))
    with pytest.raises(ConfigError, match="evaluation.lpips: .*lacks AlexNet_0/Conv_0/kernel"):
        tiny.evaluation(tiny.config(**FIELDS | {"evaluation.lpips": str(path)}))


# Fields that affect a single image, with values other than the default or tiny's.
AFFECTING = {
    "sampler": "ddpm", "steps": 4, "spacing": "leading", "eta": 0.5, "guidance": 2.5,
    "base_resolution": 8, "control_guidance": 1.0, "clip": False, "ema": False, "seed": 1,
    "size": "train",
} | {
    f"control.{name}": value for name, value in {
        "crop_top": 0.1, "crop_left": 0.1, "crop_height": 0.5, "crop_width": 0.5, "flip": 1.0,
        "aspect": 2.0, "height": 24.0, "width": 24.0,
    }.items()
}  # fmt: skip
# Fields that do not: batching, and the prompts of mode sample.
UNAFFECTING = {
    "batch_size": 3, "n": 3, "prompts": "a red circle", "prompt_file": "prompts.txt",
    "labels": (1,),
}  # fmt: skip

JITTER = {f"control.{name}" for name, scalar in SCALARS.items() if scalar.jitter}


def described(**overrides):
    config = tiny.config(**FIELDS | overrides)
    return tiny.evaluation(config).identity


def test_every_field_of_sampling_is_described_or_does_not_matter():
    names = {field.name for field in dataclasses.fields(Sampling)} - {"control", "size_range"}
    names -= {"classifier", "classifier_guidance"}  # see tests/sampling/test_classifier_guide.py
    names |= {f"control.{field.name}" for field in dataclasses.fields(ControlValues)}
    assert names == set(AFFECTING) | set(UNAFFECTING) | JITTER


@pytest.mark.parametrize("name", sorted(JITTER))
def test_color_factors_are_described_where_training_jitters_colors(name):
    field, color = f"sampling.{name}", {"data.color": 0.5}
    assert described(**color, **{field: 1.2}) != described(**color)
    assert described(**{field: 1.2}) == described()


@pytest.mark.parametrize("name", AFFECTING)
def test_fields_that_affect_images_are_described(name):
    assert described(**{f"sampling.{name}": AFFECTING[name]}) != described()


@pytest.mark.parametrize("name", UNAFFECTING)
def test_fields_that_do_not_affect_images_are_not_described(name):
    assert described(**{f"sampling.{name}": UNAFFECTING[name]}) == described()


@pytest.mark.parametrize("size, matters", [("tied", 1), ("untied", 1), ("fixed", 0), ("train", 0)])
def test_the_range_of_sizes_is_described_where_sizes_are_drawn_from_it(size, matters):
    first, second = (
        described(**{"sampling.size": size, "sampling.size_range": size_range})
        for size_range in ((20, 30), (20, 40))
    )
    assert (first != second) == matters


@pytest.mark.parametrize(
    "metric, fields",
    [
        ("prompt_accuracy", {"prompts": 4}),
        ("frechet_shapes", {"samples": 10, "reference": "validation"}),
        ("size_response", {"size_prompts": 3, "sizes": (12, 24, 48)}),
    ],
)
def test_fields_of_a_metric_are_described_only_with_it(metric, fields):
    included = {"evaluation.metrics": (metric,)}
    without = {"evaluation.metrics": tuple(name for name in MEASURED if name != metric)}
    for name, value in fields.items():
        changed = {f"evaluation.{name}": value}
        assert described(**included, **changed) != described(**included), name
        assert described(**without, **changed) == described(**without), name


def test_weights_of_lpips_are_described_by_their_content(tmp_path):
    paths = [tmp_path / name for name in ("a.npz", "b.npz", "c.npz")]
    for path, content in zip(paths, (b"one", b"one", b"other"), strict=True):
        path.write_bytes(content)
    first, same, other = (
        describe(tiny.config(**FIELDS | {"evaluation.lpips": str(path)}), {}, None)
        for path in paths
    )
    assert first == same != other and described() not in (first, other)
    assert str(tmp_path) not in json.dumps(first)


def test_the_newest_of_equal_records_counts(tmp_path):
    folder, identity = Workdir(str(tmp_path)), described() | {"step": 2}
    other = identity | {"step": 1}
    rows = [identity | {"seconds": 1}, identity | {"seconds": 2}, other | {"seconds": 3}]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert find_record(folder, identity)["seconds"] == 2
    assert find_record(folder, other)["seconds"] == 3
    for other in ({"step": 3}, {"features": None}, {"sampling": {}}, {"evaluation": {}}):
        assert find_record(folder, identity | other) is None
        if "step" not in other:
            changed = measurement_dir(folder, identity | other)
            assert changed != measurement_dir(folder, identity)


@pytest.mark.parametrize("ema", [True, False])
def test_ema_or_raw_parameters_are_measured_and_recorded(tmp_path, monkeypatch, ema):
    """In mode evaluate and at the end of training, with images of zeros instead of samples."""
    fields = FIELDS | {"evaluation.metrics": ("prompt_accuracy",), "sampling.ema": ema}
    config, restored = tiny.config(**fields), []
    objective = tiny.objective(config)

    class Restored:
        latest = 2

        def __init__(self, path, config):
            pass

        def restore_params(self, objective, mesh, *, ema):
            restored.append(ema)
            return 2, {}

    def sample_zeros(self, params, batch, *, first=0, label=""):
        return np.zeros((len(batch["label"]), 16, 16, 3), np.uint8)

    monkeypatch.setattr("condiff_jax.runs.run.Checkpoints", Restored)
    monkeypatch.setattr(sampler.Sampler, "__call__", sample_zeros)

    def finish(folder):
        evaluation = tiny.evaluation(config, folder.path)
        Reporter(objective, sharding.create_mesh(), folder, {}, evaluation).finish(2, {})

    def evaluated(folder):
        evaluate.run(config, str(folder.path))

    for name, steps in {"a": (evaluated, finish), "b": (finish, evaluated)}.items():
        folder = Workdir(str(tmp_path / name))
        folder.open(config, objective.vocabulary)
        for step in steps:  # the second finds the record of the first
            step(folder)
            assert [row["sampling"]["ema"] for row in records(folder.path)] == [ema]
    assert restored == [ema]


def test_targets_are_classes_in_turn_or_scenes():
    objective = tiny.objective(
        tiny.config(**FIELDS | {"data.semantics": "class", "model.name": "dit_ln"})
    )
    assert controllability.select_targets(objective, 12, None) == [*range(10), 0, 1]
    text = tiny.objective(tiny.config(**FIELDS))
    assert controllability.prompts_of(controllability.select_targets(text, 3, None)) == [
        scene.caption for scene in shapes.prompts(3)
    ]


def contrast_sampler(calls, params, batch, *, first=0, label="", objective=None):
    """Return images whose contrast is their height control, and record the control values."""
    calls.append(
        {name: values.copy() for name, values in batch["control"].items()} | {"first": first}
    )
    half = batch["control"]["height"][:, None, None, None] / 2
    rows = np.arange(16)[:, None, None] % 2 * 2 - 1
    return np.broadcast_to(128 + half * rows, (len(half), 16, 16, 3)).astype(np.uint8)


def measure_response(folder, **overrides):
    """Return (values, grids, sampler calls) of size_response."""
    objective, calls = tiny.objective(tiny.config(**FIELDS | overrides)), []
    fake = mock.Mock(side_effect=partial(contrast_sampler, calls), objective=objective)
    evaluation = mock.Mock(reference=None, folder=folder)
    values, grids = controllability.size_response(evaluation, fake, {}, folder.path / "parts")
    return values, grids, calls


def test_size_response_samples_square_sizes_in_order(tmp_path, monkeypatch):
    sizes, captions = (12, 16, 24), []
    monkeypatch.setattr(
        controllability, "caption_grid", lambda _, names, **__: captions.append(names)
    )
    fields = {"sampling.control.aspect": 2.0, "sampling.control.width": 64.0}
    values, grids, calls = measure_response(Workdir(str(tmp_path)), **fields)
    for size, call in zip(sizes, calls, strict=False):
        assert set(call["height"]) == set(call["width"]) == {size} and set(call["aspect"]) == {1}
    responses = [values[f"sharpness_{size}"] for size in sizes]
    expected = [
        sharpness(contrast_sampler([], {}, {"control": {"height": np.array([size])}})[0])
        for size in sizes
    ]
    assert responses == expected and responses == sorted(responses) and responses[0] > 0
    assert [name for name in values if name.startswith("sharpness_")] == [
        "sharpness_12", "sharpness_16", "sharpness_24", "sharpness_response",
    ]  # fmt: skip
    heads = [caption.split(":")[0] for caption in captions[0]]
    assert heads == 2 * ["12 px", "16 px", "24 px"]
    assert [name.split(":")[0] for name in captions[1]] == 2 * ["not flipped", "flipped"]
    assert set(grids) == {"sizes", "flip"}


def test_a_killed_response_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(controllability, "SIZE_PART", 2)
    objective, calls = tiny.objective(tiny.config(**FIELDS | {"evaluation.size_prompts": 5})), []

    def sampler(params, batch, *, first=0, label="", dies_at=9):
        index = first - controllability.FIRST_INDEX["size_response"]
        if index >= dies_at:
            raise KeyboardInterrupt
        calls.append(index)
        rng = np.random.default_rng([index, int(batch["control"]["height"][0])])
        return rng.integers(0, 256, (len(batch["label"]), 16, 16, 3), np.uint8)

    def respond(parts, **dies):
        fake = mock.Mock(side_effect=partial(sampler, **dies), objective=objective)
        evaluation = mock.Mock(reference=None)
        return controllability.size_response(evaluation, fake, {}, tmp_path / parts)[0]

    expected = respond("whole")
    assert sorted(set(calls)) == [0, 2, 4]
    with pytest.raises(KeyboardInterrupt):
        respond("killed", dies_at=4)
    calls.clear()
    assert respond("killed") == expected
    assert sorted(set(calls)) == [0, 4]  # the first part is sampled again for the grids


def test_flips_are_compared_only_for_models_with_flip_control(tmp_path):
    control = {"conditioning.control": ("crop", "size")}
    _, grids, calls = measure_response(Workdir(str(tmp_path)), **control)
    assert set(grids) == {"sizes"} and len(calls) == 3


def test_lpips_is_measured_where_there_are_weights(tmp_path, monkeypatch):
    paths = []

    def create(path):
        paths.append(path)
        return lambda a, b: np.full(len(a), 0.25)

    monkeypatch.setattr(controllability.lpips, "create", create)
    values, _, _ = measure_response(Workdir(str(tmp_path)))
    assert "size_lpips" not in values and not paths
    values, _, _ = measure_response(Workdir(str(tmp_path)), **{"evaluation.lpips": "alexnet.npz"})
    assert paths == ["alexnet.npz"] and values["size_lpips"] == values["size_lpips_hr"] == 0.25


def test_drawn_sizes_are_those_of_the_sample_indices(tmp_path):
    fields = FIELDS | {"sampling.size": "tied", "sampling.size_range": (20, 40)}
    objective, calls = tiny.objective(tiny.config(**fields)), []
    fake = mock.Mock(side_effect=partial(contrast_sampler, calls), objective=objective, mesh=None)
    evaluation = tiny.evaluation(objective.config, tmp_path)
    controllability.prompt_accuracy(evaluation, fake, {}, tmp_path)
    image_quality.measure(evaluation, fake, {}, tmp_path)
    firsts = controllability.FIRST_INDEX["prompt_accuracy"], image_quality.FIRST_INDEX
    for call, first in zip(calls, firsts, strict=True):
        assert call["first"] == first
        expected = control_values(objective.config, len(call["height"]), first=first)
        np.testing.assert_array_equal(call["height"], expected["height"])
    assert calls[0]["height"][0] != calls[1]["height"][0]
