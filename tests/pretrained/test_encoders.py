"""Runs with frozen encoders: training, sampling, export, and checks of their files."""

import json
from unittest import mock

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.parity import jit
from condiff_jax.config.errors import ConfigError
from condiff_jax.evaluation import evaluate
from condiff_jax.models.text_encoder import WordEmbedding
from condiff_jax.objectives import summary
from condiff_jax.pretrained import weights
from condiff_jax.pytorch import exporting
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import requests, sample
from condiff_jax.training import loop, transfer
from condiff_jax.training.reporters import REPORTERS
from tests import clips, tiny


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    with tiny.few_layers():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clips.write(tmp_path_factory.mktemp("clip"), num_hidden_layers=1)


def config(folder, **overrides):
    fields = {"text_encoder.name": "clip", "text_encoder.path": str(folder), "steps": 2}
    return tiny.config(**fields | {"sampling.n": 2, "log.every": 1} | overrides)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Train for two steps; returns the work directory and the frozen parameters."""
    path = tmp_path_factory.mktemp("run")
    reporter = mock.Mock(wraps=REPORTERS["diffusion"])
    with mock.patch.dict(REPORTERS, diffusion=reporter):
        assert loop.run(config(folder), str(path))
    return path, jax.device_get(reporter.call_args.args[3])


def test_training_does_not_change_the_tower(run, folder):
    path, frozen = run
    values = config(folder)
    objective = tiny.objective(values)
    checkpoints = Checkpoints(Workdir(path).checkpoints, values)
    assert objective.vocabulary.words == objective.vocabulary.classes == ()
    jax.tree.map(np.testing.assert_array_equal, frozen, objective.load_frozen())
    _, params = checkpoints.restore_params(objective, sharding.create_mesh())
    assert params.keys() == {"model"}
    stored = (path / "checkpoints" / "2" / "state" / "_METADATA").read_text()
    assert "caption" in stored and "text_encoder" not in stored
    losses = [json.loads(line)["loss"] for line in (path / "metrics.jsonl").open()]
    assert len(losses) == 2 and np.isfinite(losses).all()


def test_conditions_are_the_towers_features(folder):
    objective = tiny.objective(config(folder, **{"conditioning.padding": "zero"}))
    batch = requests.create_batch(objective, ["a red circle", "", "blue " * 50])
    frozen = objective.load_frozen()
    assert frozen.keys() == {"text_encoder"} and batch["mask"].sum(1).tolist() == [5, 2, 8]
    text = jit(objective.condition)(frozen, batch, None).semantics
    tower = objective.text_encoder
    variables = {"params": frozen["text_encoder"]}
    expected = jit(tower.apply)(variables, batch["ids"], batch["mask"])
    tokens = np.where(batch["mask"][..., None], expected.tokens, 0)
    np.testing.assert_allclose(text.tokens, tokens, atol=1e-5)
    np.testing.assert_allclose(text.pooled, expected.pooled, atol=1e-5)


def test_sampling_and_evaluation_of_the_run(run, folder):
    path, _ = run
    out = sample.run(config(folder, **{"sampling.prompts": "a red circle"}), str(path))
    assert len(list(out.glob("0*.png"))) == 2
    fields = {"evaluation.metrics": ("prompt_accuracy",), "evaluation.prompts": 2}
    (record,) = evaluate.run(config(folder, **fields, **{"data.sizes": (24, 96)}), str(path))
    assert record["evaluation"]["prompts"] == 2


def test_exports_name_the_tower(run, folder, capsys):
    out = exporting.run(config(folder), str(run[0]))
    assert f"the pipeline loads {folder}" in capsys.readouterr().out
    names = weights.read(str(out)).keys()
    assert names and all(name.startswith("model.") for name in names)


def test_files_are_recorded_once_and_others_rejected(run, folder, tmp_path):
    path, _ = run
    recorded = json.loads((path / "encoders.json").read_text())
    assert recorded.keys() == {"text_encoder"} and len(recorded["text_encoder"]) == 64
    same = clips.write(tmp_path / "same", num_hidden_layers=1)
    different = clips.write(tmp_path / "other", seed=1, num_hidden_layers=1)
    Workdir(path).load_frozen(tiny.objective(config(same)))  # the same files at another path
    for mode, fields in ((loop, {"steps": 4}), (sample, {"sampling.prompts": "a ring"})):
        with pytest.raises(
            ConfigError, match=r"^text_encoder\.path: .* are not those .* another --workdir$"
        ):
            mode.run(config(different, **fields), str(path))
    (same / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ConfigError, match=r"^text_encoder\.path: .*same"):
        loop.run(config(same, steps=4), str(path))
    assert json.loads((path / "encoders.json").read_text()) == recorded


def test_broken_weights_are_not_recorded(tmp_path):
    folder = clips.write(tmp_path / "clip", num_hidden_layers=1)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"no")
    work = Workdir(tmp_path / "run")
    work.path.mkdir()
    objective = tiny.objective(config(folder))
    with pytest.raises(ConfigError, match="text_encoder.path: .* cannot be read"):
        work.load_frozen(objective)
    (folder / "model.safetensors").write_bytes(good)
    assert work.load_frozen(objective).keys() == {"text_encoder"}


def test_encoding_of_captions_can_be_sent_to_worker_processes(folder):
    encode = tiny.objective(config(folder)).encode_text
    for _ in range(2):  # before files are read, and after
        copy = cloudpickle.loads(cloudpickle.dumps(encode))
        np.testing.assert_array_equal(copy("a red ring"), encode("a red ring"))


def test_objectives_and_summaries_do_not_read_files():
    """Summary, plan and transfer work without the files."""
    objective = tiny.objective(config(""))
    assert isinstance(tiny.objective(tiny.config()).text_encoder, WordEmbedding)
    expected = summary.summarize(tiny.objective(tiny.config()))
    assert summary.summarize(objective) == expected  # the tower is not counted
    with pytest.raises(ConfigError, match="text_encoder.path: empty"):
        objective.load_frozen()


def test_summary_lists_frozen_encoders(folder, capsys, monkeypatch):
    latents = {"autoencoder.name": "kl", "autoencoder.size": "tiny"}
    summary.run(config(folder, **latents))
    lines = capsys.readouterr().out.splitlines()
    network = tiny.objective(config(folder, **latents)).frozen["autoencoder"].shapes()
    count = summary.count_parameters(network)
    assert f"Frozen besides: autoencoder, {count:,} parameters" in lines
    count = sum(a.size for a in jax.tree.leaves(tiny.objective(config(folder)).load_frozen()))
    assert f"Frozen besides: text_encoder, {count:,} parameters" in lines
    assert json.loads(lines[-1]).keys() == {"parameters", "gflop_forward"}
    monkeypatch.setattr(summary, "summarize", lambda objective: {})  # saves time
    for path, reason in (("", "text_encoder.path: empty"), ("/no/such", "text_encoder.path: ")):
        summary.run(config(path))
        output = capsys.readouterr().out
        assert f"Frozen besides: text_encoder, of unknown size ({reason}" in output
    summary.run(config("", **{"text_encoder.length": 77, "text_encoder.width": 768}))
    assert "Frozen besides: text_encoder, 123,060,480 parameters" in capsys.readouterr().out


def test_bf16_runs_encode_in_bf16(folder):
    objective = tiny.objective(config(folder, **{"model.dtype": "bfloat16"}))
    batch, frozen = requests.create_batch(objective, ["a ring"]), objective.load_frozen()
    text = jax.eval_shape(
        lambda f: objective.text_encoder.apply(
            {"params": f["text_encoder"]}, batch["ids"], batch["mask"]
        ),
        frozen,
    )
    assert text.tokens.dtype == text.pooled.dtype == jnp.bfloat16
    shapes = jax.eval_shape(lambda: objective.example_cond()).semantics
    assert shapes.tokens.dtype == jnp.bfloat16 and shapes.tokens.shape[1:] == text.tokens.shape[1:]


@pytest.mark.parametrize("name", ["words", "clip"])
def test_transfer_reinitializes_the_input_layer_of_another_encoder(folder, name):
    old = tiny.objective(
        tiny.config(**{"text_encoder.name": name, "text_encoder.path": "elsewhere"})
    )
    moves = transfer.plan(old, tiny.objective(config(folder)))
    statuses = {move.status for key, move in moves.items() if key.startswith("model/caption")}
    assert statuses == {"kept" if name == "clip" else "new"}
    assert not any(key.startswith("text_encoder") for key in moves)
