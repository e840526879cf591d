"""Files of a work directory are replaced in one step: a failure leaves the old ones."""

import pytest
from etils import epath

from condiff_jax import workdir


@pytest.mark.parametrize("content", ["new", b"new"])
def test_a_file_is_replaced_whole(tmp_path, content):
    path = epath.Path(tmp_path) / "config.json"
    for old in (None, "a longer text than the new one"):
        if old:
            path.write_text(old)
        workdir.write(path, content)
        assert path.read_text() == "new"
        assert [one.name for one in path.parent.iterdir()] == ["config.json"]


def test_a_failure_before_the_last_step_leaves_the_old_content(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "config.json"
    path.write_text("old")

    def fail(self, target):
        raise OSError("the disk is gone")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        workdir.write(path, "new")
    assert path.read_text() == "old"


def test_forgetting_keeps_the_lines_up_to_a_step(tmp_path, monkeypatch):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    workdir.forget_after(path, 1)
    assert not path.exists()
    for step in (1, 2, 3):
        workdir.append_json(path, {"step": step})
    workdir.forget_after(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
