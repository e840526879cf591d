"""Evaluations of one run: settings that vary name the rows, numbers become curves."""

import json
from xml.etree import ElementTree

import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.studies import results
from tests.studies import commands


def record(weight, guidance, value, seed=0, step=10):
    sampling = {"sampler": "ddim", "guidance": guidance, "seed": seed, "control": {"flip": 0.0}}
    if weight is not None:
        sampling |= {"classifier": {"config": "ab", "step": 4}, "classifier_guidance": weight}
    return {
        "step": step, "sampling": sampling, "features": None, "seconds": 1.0,
        "evaluation": {"metrics": ["prompt_accuracy", "fid"], "prompts": 8},
        "metrics": {"all": value}, "pictures": {},
    }  # fmt: skip


RECORDS = [
    {"step": 5, "accuracy": 0.5},  # a record of a classifier's training
    *(record(weight, 0.0, 0.1 * weight) for weight in (0.0, 1.0, 4.0)),
    record(1.0, 0.0, 0.9),  # evaluated again
    record(1.0, 0.0, 0.7, seed=1),
    *(record(weight, 1.5, 0.5) for weight in (0.0, 1.0, 4.0)),
]


@pytest.fixture
def workdir(tmp_path):
    text = "".join(json.dumps(entry) + "\n" for entry in RECORDS)
    (tmp_path / "evaluation.jsonl").write_text(text)
    return tmp_path


def test_rows_are_named_by_settings_that_vary_and_have_the_last_of_each_seed(workdir):
    rows, common = results.group_evaluations(results.read_evaluations(str(workdir)))
    assert [row.row for row in rows] == [
        f"guidance={guidance},classifier_guidance={weight}"
        for guidance in ("0", "1.5") for weight in ("0", "1", "4")
    ]  # fmt: skip
    assert rows[1].values("all") == [0.9, 0.7] and rows[2].values("all") == [0.4]
    assert common == {
        "step": "10", "sampler": "ddim", "control.flip": "0", "classifier.config": "ab",
        "classifier.step": "4", "metrics": "prompt_accuracy+fid", "prompts": "8",
    }  # fmt: skip


def test_the_report_has_a_curve_for_each_value_of_the_other_setting(workdir, tmp_path, capsys):
    assert commands.report(f"--workdir={workdir}") == 0
    out = capsys.readouterr().out
    assert "guidance=0,classifier_guidance=1" in out and "0.8 ± 0.1" in out
    page, saved = tmp_path / "page.html", tmp_path / "saved.json"
    assert commands.report(f"--workdir={workdir}", f"--html={page}", f"--save={saved}") == 0
    text = page.read_text()
    root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + len("</svg>")])
    assert root.get("aria-label") == "all over classifier_guidance"
    labels = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"guidance=0", "guidance=1.5", "classifier_guidance"} <= labels
    assert commands.report(f"--results={saved}") == 0
    assert str(workdir) not in saved.read_text()
    assert capsys.readouterr().out.splitlines()[2:] == out.splitlines()[2:]


def test_records_with_and_without_a_classifier_are_separate_rows(tmp_path):
    rows, common = results.group_evaluations(
        [record(None, 1.0, 0.2), record(2.0, 1.0, 0.3, step=20)]
    )
    assert [row.row for row in rows] == [
        "step=10", "step=20,classifier.config=ab,classifier.step=4,classifier_guidance=2",
    ]  # fmt: skip
    assert common["guidance"] == "1"


def test_the_root_of_images_is_the_work_directory(workdir):
    assert {entry["root"] for entry in results.read_evaluations(str(workdir))} == {str(workdir)}


def test_settings_are_flat_and_without_separators_of_row_arguments():
    deep = record(None, 1.0, 0.2)
    deep["sampling"]["control"] = {"a": {"b": {"c": 0.5}}, "d": "x=1,2"}
    fields = results.settings(deep)
    assert fields["control.a.b.c"] == "0.5" and fields["control.d"] == "x:1;2"


def test_seeds_are_in_order():
    (row,), _ = results.group_evaluations(
        [record(1.0, 0.0, 0.1 * seed, seed=seed) for seed in (3, 1, 2)]
    )
    assert row.values("all") == pytest.approx([0.1, 0.2, 0.3])


def test_places_without_evaluations_are_named(tmp_path):
    with pytest.raises(ConfigError, match="none: is not a work directory or a .json of"):
        results.read_evaluations(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="no evaluations here; run --mode=evaluate"):
        results.read_evaluations(str(tmp_path))
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(ConfigError, match="x.json: not a file of results"):
        results.read_evaluations(str(tmp_path / "x.json"))
