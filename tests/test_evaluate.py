"""Mode evaluate: every metric, measured once, with all that its numbers depend on."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from condiff_jax import evaluate, optim, sample, sharding, state
from condiff_jax.checkpoint import Checkpoints
from condiff_jax.config import ConfigError
from condiff_jax.data import augment, shapes
from condiff_jax.logs import Reporter
from condiff_jax.metrics import METRICS, shapes_features
from condiff_jax.workdir import Workdir
from tests import tiny

FIELDS = {
    "steps": 2,
    "evaluation.metrics": METRICS,
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
    """(folder, fields) of a finished run, as training leaves it, with random parameters."""
    fields = FIELDS | (CLASS if request.param == "class" else {})
    path, config = tmp_path_factory.mktemp(request.param), tiny.config(**fields)
    system, mesh, folder = tiny.system(config), sharding.create_mesh(), Workdir(str(path))
    folder.open(config, system.vocabulary)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda a: rng.normal(0, 0.2, a.shape).astype(np.float32),
        jax.eval_shape(system.init, jax.random.key(0)),
    )
    train_state = state.create(params, optim.create(config)).replace(step=jnp.array(2))
    checkpoints = Checkpoints(folder.checkpoints, config, create=True)
    checkpoints.save(2, train_state, None, 0.0)
    checkpoints.close()
    Reporter(system, mesh, folder, None).finish(2, train_state.ema)
    return path, fields


def records(path):
    return [json.loads(line) for line in (path / "evaluation.jsonl").read_text().splitlines()]


def no_sampling():
    return mock.patch.object(sample.Sampler, "__call__", side_effect=AssertionError("sampled"))


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
    assert record["features"] == shapes_features.sha256()
    assert record["sampling"]["ema"] is True and record["sampling"]["control"]["height"] == 16
    assert record["evaluation"] == {
        "metrics": sorted(METRICS), "prompts": 3, "samples": 9, "reference": "train",
        "size_prompts": 2, "sizes": [12, 16, 24],
    }  # fmt: skip
    assert set(record["pictures"]) == {"grid", "sizes", "flip"}
    for name in record["pictures"].values():
        assert name.startswith("samples/2-") and np.asarray(Image.open(path / name)).std() > 0


def test_a_second_time_nothing_is_sampled(trained, capsys):
    path, fields = trained
    with no_sampling():
        record = evaluate.run(tiny.config(**fields), str(path))
        # What numbers do not depend on makes no other evaluation.
        again = evaluate.run(tiny.config(**fields | {"sampling.n": 2, "steps": 3}), str(path))
    assert record == again == records(path)[0]
    out = capsys.readouterr().out
    assert "already measured" in out and "Prompt accuracy on 3 unseen prompts: colour" in out
    assert "Frechet distance on shapes features" in out and "size_l2_hr" in out


def test_another_setting_is_another_record(trained):
    path, fields = trained
    before = records(path)
    fields = fields | {"evaluation.metrics": ("prompt_accuracy",)}
    record = evaluate.run(tiny.config(**fields, **{"sampling.guidance": 2.0}), str(path))
    assert records(path) == [*before, record]
    assert record["sampling"]["guidance"] == 2 and record["features"] is None
    assert not set(record["pictures"].values()) & set(before[0]["pictures"].values())
    for change in ({"sampling.ema": False}, {"sampling.seed": 1}, {"evaluation.prompts": 2}):
        config = tiny.config(**fields | change)
        identity = evaluate.describe(config, 2, ema=config.sampling.ema)
        assert evaluate.measured(Workdir(str(path)), identity) is None


def test_a_checkpoint_past_the_asked_step_is_an_error(trained):
    path, fields = trained
    with pytest.raises(ConfigError, match="trained on past steps=1, to step 2"):
        evaluate.run(tiny.config(**fields | {"steps": 1}), str(path))


def test_noise_is_one_for_all_sizes_and_no_metric_shares_it(tmp_path):
    """The requests of each metric, with a sampler that returns their noise's numbers."""
    system, calls = tiny.system(tiny.config(**FIELDS)), []

    def sampler(params, batch, *, first=0, label=""):
        control = {name: values[0] for name, values in batch["control"].items()}
        calls.append((len(batch["label"]), first, control))
        return np.random.default_rng(0).integers(0, 255, (len(batch["label"]), 16, 16, 3), np.uint8)

    fake = mock.Mock(side_effect=sampler, system=system)
    record = evaluate.measure(fake, {}, 2, Workdir(str(tmp_path)), ema=True)
    assert record["metrics"]["size_l2"] == 0  # the same noise: the same pictures
    accuracy, frechet, *sized = calls
    assert (accuracy[0], frechet[0], [call[0] for call in sized]) == (3, 9, [2] * 5)
    assert len({call[1] for call in sized}) == 1
    assert len({accuracy[1], frechet[1], sized[0][1]}) == 3
    assert [call[2]["height"] for call in sized] == [12, 16, 24, 16, 16]
    assert [call[2]["width"] for call in sized] == [12, 16, 24, 16, 16]
    assert [call[2]["flip"] for call in sized] == [0, 0, 0, 0, 1]


def test_reference_is_unseen_and_asked_alike(tmp_path):
    """Pictures that equal the reference's own have a distance of 0."""
    for reference in ("train", "validation"):
        config = tiny.config(**FIELDS | {"evaluation.reference": reference})
        system, start = tiny.system(config), 2**30 if reference == "train" else 0
        source = shapes.Shapes(reference, config.data.sizes)
        rows = [source[start + i] for i in range(9)]
        asked = [system.encode_text(row["caption"])[0] for row in rows]

        def sampler(params, batch, *, first=0, label="", rows=rows, asked=asked):
            np.testing.assert_array_equal(batch["ids"], asked)
            return np.stack([augment.center(row["image"], 16)[0] for row in rows])

        fake = mock.Mock(side_effect=sampler, system=system)
        values, _ = evaluate.frechet_shapes(fake, {}, Workdir(str(tmp_path)))
        assert values["frechet_shapes"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"evaluation.reference": "coco"}, "evaluation.reference=coco"),
        ({"evaluation.reference": "validation", "evaluation.samples": 10_001}, "has 10000"),
        ({"evaluation.lpips": "/no/such.npz"}, "evaluation.lpips: .*does not exist"),
        ({"evaluation.metrics": ()}, "evaluation.metrics is empty"),
        ({"data.resolution": 8}, "data.resolution=16 or more"),
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
        evaluate.check(tiny.config(**FIELDS | {"evaluation.lpips": str(path)}))
