"""Files of a work directory: written atomically, and consistent after a run was killed."""

import dataclasses
import json

import pytest
from etils import epath

from condiff_jax.config.build import with_fields
from condiff_jax.config.errors import ConfigError
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime.files import append_json, drop_lines_after, read_json_lines, write_file
from condiff_jax.training.reporters.base import Log
from tests import tiny


@pytest.mark.parametrize("content", ["new", b"new"])
def test_a_file_is_replaced_whole(tmp_path, content):
    path = epath.Path(tmp_path) / "config.json"
    for old in (None, "a longer text than the new one"):
        if old:
            path.write_text(old)
        write_file(path, content)
        assert path.read_text() == "new"
        assert [file.name for file in path.parent.iterdir()] == ["config.json"]


def test_a_failure_before_the_last_step_leaves_the_old_content(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "config.json"
    path.write_text("old")

    def fail(self, target):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_file(path, "new")
    assert path.read_text() == "old"


def test_lines_up_to_a_step_are_kept(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    drop_lines_after(path, 1)
    assert not path.exists()
    for step in (1, 2, 3):
        append_json(path, {"step": step})
    drop_lines_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_resumed_run_drops_what_was_logged_beyond_its_step(tmp_path):
    """Evaluations and grids of the lost weights must not pass for those of the new ones."""
    folder = Workdir(tmp_path)
    folder.samples.mkdir()
    for name in ("2.png", "3.png", "3-seed0-grid.png"):
        (folder.samples / name).write_bytes(b"")
    for path in (folder.metrics, folder.evaluation):
        for step in (1, 2, 3):
            append_json(path, {"step": step})
    Log(folder, first=2)
    assert {path.name for path in folder.samples.iterdir()} == {"2.png", "3-seed0-grid.png"}
    for path in (folder.metrics, folder.evaluation):
        assert [line["step"] for line in read_json_lines(path)] == [1, 2]


@pytest.mark.parametrize("torn", ["", '{"st', '{"step": 1}'])
def test_a_torn_last_line_is_left_out_and_dropped(tmp_path, torn):
    path = Workdir(tmp_path).metrics
    path.write_text('{"step": 0}\n' + torn)
    assert read_json_lines(path) == [{"step": 0}]
    append_json(path, {"step": 5})
    assert path.read_text() == '{"step": 0}\n{"step": 5}\n'


@pytest.mark.parametrize("text", ["{", '{"model": 1}', '{"modle": {}}'])
def test_a_damaged_config_is_an_error_that_names_it(tmp_path, text):
    folder = Workdir(tmp_path)
    folder.config.write_text(text)
    with pytest.raises(ConfigError, match="config.json: damaged, or of another version"):
        folder.load_config()


def test_fields_that_are_newer_than_a_run_have_their_defaults(tmp_path):
    config, folder = tiny.config(**{"log.stall": 7}), Workdir(tmp_path)
    values = dataclasses.asdict(config)
    del values["log"]["stall"], values["parallel"], values["profile"], values["data"]["workers"]
    del values["data"]["crop"]
    folder.config.write_text(json.dumps(values))
    folder.check(config)
    assert folder.load_config() == with_fields(config, {"log.stall": 600})
    with pytest.raises(ConfigError, match=r"data.crop: \(0.9, 1.0\) -> \(0.5, 1.0\)"):
        folder.check(with_fields(config, {"data.crop": (0.5, 1.0)}))


def test_a_run_from_before_model_conditioner_existed_resumes(tmp_path):
    fields = {"model.name": "unet2d", "model.size": "tiny", "data.semantics": "class"}
    values = tiny.values(**fields)
    values.init.pretrain = tiny.values(**fields)
    folder, film = Workdir(tmp_path), create_config(values)
    values.model.conditioner = "adanorm"
    old = dataclasses.asdict(film)
    del old["model"]["conditioner"], old["init"]["pretrain"]["model"]["conditioner"]
    folder.config.write_text(json.dumps(old))
    folder.check(film)
    with pytest.raises(ConfigError, match="model.conditioner: film -> adanorm"):
        folder.check(create_config(values))


def test_a_run_without_checkpoints_may_change_its_encoders(tmp_path):
    folder, vocabulary = Workdir(tmp_path), Vocabulary(("a",), ())
    folder.encoders.write_text("{}")
    folder.open(tiny.config(), vocabulary)
    assert not folder.encoders.exists()
    folder.encoders.write_text("{}")
    folder.open(tiny.config(), vocabulary, begun=True)
    assert folder.encoders.exists()
