"""Transfer: kept, resized and new parameters; resizing; stages in order and resumed."""

import json
import re

import jax
import numpy as np
import pytest

from benchmarks.parity import jit
from condiff_jax.config.errors import ConfigError
from condiff_jax.models import MODELS
from condiff_jax.objectives.validate import create_config
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.training import loop, transfer
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    with tiny.few_layers():
        yield


def objective(**overrides):
    return tiny.objective(tiny.config(**overrides))


CLASS = {"data.semantics": "class"}
LARGER = {"data.resolution": 32, "model.base_resolution": 16, "diffusion.base_resolution": 16}


def statuses(moves, status):
    return {name for name, move in moves.items() if move.status == status}


@pytest.mark.parametrize("name", MODELS)
def test_a_larger_resolution_keeps_all_but_learned_positions(name):
    size = {"model.name": name, "model.size": "tiny/4" if MODELS[name].patched else "tiny"}
    moves = transfer.plan(objective(**size, **CLASS), objective(**size, **CLASS, **LARGER))
    resized = {n for n in moves if re.search(r"positions|relative_bias", n)}
    assert statuses(moves, "resized") == resized
    assert bool(resized) == (name == "mdtv2")
    assert not statuses(moves, "new")


def test_other_data_make_semantics_new_and_keep_the_rest():
    ten, thirty, text = objective(**CLASS), objective(**CLASS, **{"data.classes": 30}), objective()
    assert statuses(transfer.plan(ten, thirty), "new") == {"model/class_embed/embedding"}
    to_text, to_classes = transfer.plan(ten, text), transfer.plan(text, ten)
    words = {n for n in to_text if n.startswith(("model/caption", "text_encoder"))}
    assert statuses(to_text, "new") == words and len(words) > 4
    assert statuses(to_classes, "new") == {"model/class_embed/embedding"}
    query = to_text["model/blocks/context_query/linear/kernel"]
    assert query == transfer.Move("kept", "model/blocks/query/linear/kernel")
    unused = transfer.unused(to_classes, transfer.shapes_of(text))
    assert words <= set(unused) and all(n in words or "context_" in n for n in unused)
    assert len(statuses(to_text, "kept")) + len(words) == len(to_text)
    assert not statuses(transfer.plan(text, text), "new")


def test_control_can_be_added_to_a_model_without_it():
    without = objective(**{"conditioning.control": ()})
    moves = transfer.plan(without, objective())
    assert statuses(moves, "new") == {n for n in moves if n.startswith("model/control/")}


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({}, {"model.size": "S/4"}, "init: model.size is S/4, but that of the start is tiny/4"),
        ({}, {"autoencoder.scale": 2.0}, "autoencoder.scale is 2.0"),
        ({}, {"diffusion.prediction": "v"}, "diffusion.prediction is v"),
        ({}, {"conditioning.control": ()}, "same conditioning.control"),
        ({"conditioning.control": ("crop",)}, {}, "same conditioning.control"),
        (
            {"conditioning.control": ("crop", "flip")},
            {"conditioning.control": ("crop", "aspect")},  # the same shapes
            "same conditioning.control",
        ),
        ({}, {"model.qk_norm": False}, "the start has model/blocks/key_norm"),
        ({"model.streams": "full"}, {}, "model/"),
    ],
)
def test_what_does_not_match_is_an_error_that_names_it(old, new, message):
    with pytest.raises(ConfigError, match=message):
        transfer.plan(objective(**old), objective(**new))


MUST_MATCH = {  # fields that must agree, with values other than those of tiny.py
    "model.name": "mmdit",
    "model.size": "S/4",
    "diffusion.timesteps": 500,
    "diffusion.prediction": "v",
    "autoencoder.name": "kl",
    "autoencoder.size": "tiny",
    "autoencoder.scale": 2.0,
    "autoencoder.shift": 0.5,
}


def test_the_fields_that_must_agree_are_all_tried():
    assert set(MUST_MATCH) == set(transfer.MUST_MATCH)


@pytest.mark.parametrize("field", MUST_MATCH)
def test_each_field_that_must_agree_is_compared(field):
    old = objective(**CLASS, **{"data.resolution": 32})
    new = objective(**CLASS, **{"data.resolution": 32, field: MUST_MATCH[field]})
    for start, goal in ((old, new), (new, old)):
        with pytest.raises(ConfigError, match=f"init: {field} is .*of the start is"):
            transfer.plan(start, goal)


def test_texts_of_another_length_make_words_and_captions_new():
    old, new = objective(), objective(**{"text_encoder.length": 12})
    for start, goal in ((old, new), (new, old)):
        moves = transfer.plan(start, goal)
        words = {n for n in moves if n.startswith(("model/caption", "text_encoder"))}
        assert statuses(moves, "new") == words and len(words) > 4


def test_control_of_sizes_is_not_added_to_other_control():
    with_size = objective(**{"conditioning.control": ("crop", "flip", "size")})
    without = objective(**{"conditioning.control": ("crop", "flip")})
    for start, goal in ((with_size, without), (without, with_size)):
        with pytest.raises(ConfigError, match="start has conditioning.control=.*use the same"):
            transfer.plan(start, goal)


def test_resizing_keeps_ends_and_straight_lines_and_undoes_itself():
    for old, new in ((4, 8), (8, 3), (1, 4), (5, 5)):
        matrix = transfer.resizing_matrix(old, new)
        assert matrix.shape == (new, old)
        line = np.linspace(2.0, 2.0 if old == 1 else 7.0, old)
        expected = np.linspace(line[0], line[-1], new)
        np.testing.assert_allclose(matrix @ line, expected, atol=1e-12)
        np.testing.assert_allclose(matrix.sum(1), 1)
    larger = transfer.resizing_matrix(4, 7)  # positions of the old grid are among those of the new
    np.testing.assert_allclose(transfer.resizing_matrix(7, 4) @ larger, np.eye(4), atol=1e-12)
    more = transfer.resizing_matrix(2, 3, "extrapolate")
    np.testing.assert_array_equal(more, [[1, 0], [0, 1], [0, 0]])


MDT = {"model.name": "mdtv2", **CLASS}


def drawn(objective, *names):
    """Initial parameters of these names; XLA does not compute the others."""

    def draw(key):
        params = transfer.by_name(objective.init(key))
        return {name: params[name] for name in names}

    return jit(draw)(jax.random.key(1))


def moved(old, new, params, *names):
    """The parameters of these names after a transfer; new ones are drawn by numpy."""
    moves = transfer.plan(old, new)

    def move(params, fresh):
        after = transfer.by_name(transfer.move(moves, params, fresh))
        return {name: after[name] for name in names}

    return jit(move)(params, tiny.random_params(new.shapes))


@pytest.mark.parametrize("position", ["resample", "extrapolate"])
def test_positions_that_learned_nothing_become_those_of_the_new_grid(position):
    old = objective(**MDT, **{"model.position": position})
    new = objective(**MDT, **LARGER, **{"model.position": position})
    names = ("model/positions", "model/decoder_positions")
    params = transfer.by_name(tiny.random_params(old.shapes)) | drawn(old, *names)
    fresh, after = drawn(new, *names), moved(old, new, params, *names)
    for name in names:
        np.testing.assert_allclose(after[name], fresh[name], atol=1e-6)
    # A learned slope along the columns stays a slope between the same values.
    slope = np.tile(np.arange(4.0), 4)[:, None]
    params["model/positions"] = params["model/positions"] + slope
    learned = moved(old, new, params, *names)["model/positions"] - fresh["model/positions"]
    values = np.linspace(0, 3, 8) if position == "resample" else [0, 1, 2, 3, 0, 0, 0, 0]
    np.testing.assert_allclose(
        learned.reshape(8, 8, -1)[0], np.outer(values, np.ones(32)), atol=1e-5
    )


@pytest.mark.parametrize("position", ["resample", "extrapolate"])
def test_relative_biases_keep_offset_zero_and_the_largest(position):
    old = objective(**MDT, **{"model.position": position})
    new = objective(**MDT, **LARGER, **{"model.position": position})
    name = "model/in_blocks/relative_bias"
    params = transfer.by_name(tiny.random_params(old.shapes))
    before, after = params[name], moved(old, new, params, name)[name]
    assert before.shape == (1, 7 * 7 + 3, 2) and after.shape == (1, 15 * 15 + 3, 2)
    np.testing.assert_array_equal(after[:, -3:], before[:, -3:])
    before, after = before[:, :-3].reshape(7, 7, 2), after[:, :-3].reshape(15, 15, 2)
    np.testing.assert_allclose(after[7, 7], before[3, 3], rtol=1e-5)
    if position == "resample":
        np.testing.assert_allclose(after[0, -1], before[0, -1], rtol=1e-5)
    else:
        np.testing.assert_allclose(after[4:11, 4:11], before, rtol=1e-6)
        assert not after[0].any()


def parameters(path, config, ema=False):
    folder = Workdir(path)
    _, params = Checkpoints(folder.checkpoints, config).restore_params(
        tiny.objective(config), sharding.create_mesh(1), ema=ema
    )
    return jax.device_get(transfer.by_name(params))


def two_stages(**overrides):
    fields = {"sampling.n": 2, "batch_size": 8, "log.every": 1, "model.name": "dit_ln", **CLASS}
    first = tiny.values(steps=3, **fields)
    constant = {"optimizer.learning_rate": 0.0, "data.classes": 30, "init.pretrain": first}
    second = {**fields, **LARGER, **constant, "steps": 2, **overrides}
    return tiny.config(**second)


def test_stages_run_in_one_command_and_resume_in_the_middle(tmp_path, capsys, monkeypatch):
    config = two_stages()
    train_steps, earlier = loop.train_steps, config.init.pretrain

    def interrupted(objective, mesh, train_state, data, step, checkpoints, reporter, interrupt):
        def stepped(*inputs):
            interrupt.requested = True  # as SIGTERM does, in the first stage's first step
            return step(*inputs)

        return train_steps(
            objective, mesh, train_state, data, stepped, checkpoints, reporter, interrupt
        )

    monkeypatch.setattr(loop, "train_steps", interrupted)
    assert not loop.run(config, str(tmp_path / "run"))
    assert "Stopped at step 1" in capsys.readouterr().out
    monkeypatch.setattr(loop, "train_steps", train_steps)
    assert loop.run(config, str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert (
        "First stage: 3 steps" in out
        and "kept     model/blocks/attention/query/linear/kernel" in out
    )
    assert "new      model/class_embed/embedding (31, 32)" in out
    assert "left     model/class_embed/embedding (11, 32)" in out
    assert (tmp_path / "run" / "transfer.txt").read_text() in out
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [1, 2]
    # With a learning rate of zero, raw and EMA parameters stay at the first stage's EMA.
    start = parameters(tmp_path / "run" / "pretrain", earlier, ema=True)
    for ema in (False, True):
        end = parameters(tmp_path / "run", config, ema=ema)
        for name in ("model/blocks/attention/query/linear/kernel", "model/final/bias"):
            np.testing.assert_allclose(end[name], start[name], rtol=1e-6)  # the EMA rounds
    assert loop.run(config, str(tmp_path / "run"))
    assert "Nothing to do" in capsys.readouterr().out


def test_a_mismatched_start_leaves_the_folder_usable(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="diffusion.prediction is v"):
        loop.run(two_stages(**{"diffusion.prediction": "v"}), str(tmp_path))
    assert not (tmp_path / "pretrain").exists()
    stopped = []
    monkeypatch.setattr(loop, "start", lambda *_: stopped.append(1))
    assert not loop.run(two_stages(), str(tmp_path)) and stopped


def test_init_path_starts_from_a_finished_run(tmp_path):
    config = two_stages()
    loop.run(config.init.pretrain, str(tmp_path / "first"))
    source = {"init.path": str(tmp_path / "first"), "init.ema": False}
    second = two_stages(**source, **{"init.pretrain": None})
    loop.run(second, str(tmp_path / "second"))
    raw = parameters(tmp_path / "first", config.init.pretrain)
    name = "model/blocks/attention/query/linear/kernel"
    np.testing.assert_array_equal(parameters(tmp_path / "second", second)[name], raw[name])
    with pytest.raises(ConfigError, match=r"has trained for 3 steps, but init.pretrain.steps=2"):
        values = json.loads(two_stages(**source).to_json())
        values["init"]["pretrain"]["steps"] = 2
        loop.run(create_config(values), str(tmp_path / "third"))
    with pytest.raises(ConfigError, match="init.path: .*no run here"):
        nowhere = {"init.pretrain": None, "init.path": str(tmp_path / "nowhere")}
        loop.run(two_stages(**nowhere), str(tmp_path / "fourth"))
