"""Reports: Table A1, means over seeds, missing rows, provenance, input files."""

import json
import os
import re
import runpy
from pathlib import Path

import pytest

from condiff_jax.objectives.validate import create_config
from condiff_jax.studies import report, results
from tests.studies import commands
from tests.studies.records import record, save

ROOT = Path(__file__).parents[2]
TABLE = runpy.run_path(str(ROOT / "configs" / "tableA1.py"))
RECORDED = (ROOT / "docs" / "tableA1.md").read_text()


def recorded(row):
    """The cells of a row in docs/tableA1.md: for each value the paper's, ours, difference."""
    name = row.replace("arch=", "").replace("data=", "").replace("resolution=", "")
    _, *values = cells(RECORDED, name)
    return [values[:3], values[3:]]


def cells(text, row):
    """The cells of a row in Markdown."""
    lines = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines())
    return next(line for line in lines if line[0] == row)


# Tracing a UNet takes seconds, so the default suite has one of its rows.
SLOW = [row for row in TABLE["ROWS"] if "unet" in row and "imagenet1k,resolution=256" not in row]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=pytest.mark.slow) if row in SLOW else row for row in TABLE["ROWS"]],
)
def test_cells_equal_the_recorded_ones_and_sizes_the_papers(row):
    ours = report.size_and_flop(create_config(TABLE["get_config"](row)))
    paper = list(TABLE["PAPER"][row].values())
    for value, (_, cell, _) in zip(ours, recorded(row), strict=True):
        assert f"{value:.2f}" == cell
    if "dit_att" not in row:  # the paper does not say how it is built, see NOTES
        assert ours[0] == pytest.approx(paper[0], rel=0.01)
    if "imagenet1k" in row and "unet" not in row and "dit_att" not in row:
        assert ours[1] == pytest.approx(paper[1], rel=0.01)


@pytest.mark.parametrize("row, paper", TABLE["PAPER"].items())
def test_every_large_difference_has_a_note(row, paper):
    for value, (theirs, ours, difference) in zip(paper.values(), recorded(row), strict=True):
        change = float(ours) / value - 1
        assert float(theirs) == value
        assert float(difference.rstrip("%")) == pytest.approx(100 * change, abs=0.06)
        arch = row.split(",")[0].removeprefix("arch=")
        assert abs(change) < 0.01 or any(note.startswith(arch) for note in TABLE["NOTES"])
    assert all(note in RECORDED for note in TABLE["NOTES"])


def test_a_computed_table_shows_paper_ours_and_difference(tmp_path, monkeypatch):
    monkeypatch.setitem(report.COMPUTED, "tableA1", lambda config: (800.0, 300.0))
    text, html = tmp_path / "a.md", tmp_path / "a.html"
    options = [f"--markdown={text}", f"--html={html}"]
    assert commands.report(f"--config={ROOT}/configs/tableA1.py", *options) == 0
    shown = text.read_text()
    row = ["mmdit,cc12m,256", "791.64", "800.00", "+1.1%", "397.06", "300.00", "-24.4%"]
    assert cells(shown, row[0]) == row
    assert cells(shown, "row") == cells(RECORDED, "row")
    assert all(f"- {note}\n" in shown for note in TABLE["NOTES"])
    assert "mmdit, cc12m, 512" in html.read_text() and html.read_text().count("<tr>") == 22


def test_rows_show_the_paper_means_over_seeds_and_provenance(swept, shown):
    text = shown(*swept)
    head = cells(text, "row")
    assert head[1:5] == ["paper: FID", "paper: CLIP", "ours: accuracy", "ours: shift"]
    assert head[5:] == [
        f"provenance: {name}" for name in ("seeds", "scale", "steps", "run", "device", "commit")
    ]
    here = ["small", "100", "0a1b2c30, 0a1b2c31", "TPU v5e", "0123456+"]
    zero = cells(text, "padding=zero")
    assert zero == ["padding=zero", "3", "-", "0.6 ± 0.1", "4 ± 0", "0, 1", *here]
    # A diverged seed is not part of the mean; the paper's cross is shown as diverged.
    other = cells(text, "padding=a<b")
    assert other[1:6] == ["diverged", "26.6", "0.5", "4", "0, 1 diverged"]
    assert cells(text, "padding=noisy") == ["padding=noisy", "2.75", *9 * "-"]
    for note in (
        "The paper's numbers and ours are not comparable",
        "smaller models on embedded data",
        "mean over seeds ± half of their range",
        "padding=a<b, seed 1 diverged: step 3: <loss> nan",
        "beta is 'small' & more",
        "Cited by the paper, another [1]: FID 4.5",
    ):
        assert note in text


def test_the_same_metrics_at_the_papers_scale_are_compared(swept, tmp_path, shown):
    result = record("padding=zero", 0, scale="paper", metrics={"FID": 3.1})
    save(tmp_path / "other", [result])
    text = shown(swept[0], f"--results={tmp_path}/other")
    assert "not comparable" not in text
    assert cells(text, "row")[3] == "ours: FID" and cells(text, "padding=zero")[3] == "3.1"


def test_a_metric_that_the_paper_lacks_is_not_comparable_at_its_scale(swept, tmp_path, shown):
    metrics = {"FID": 3.1, "accuracy": 0.5}
    save(tmp_path / "other", [record("padding=zero", 0, scale="paper", metrics=metrics)])
    text = shown(swept[0], f"--results={tmp_path}/other")
    assert "not comparable: ours are other measures. Compare" in text


def test_intermediate_values_of_a_metric_have_no_column(swept, tmp_path, shown):
    metrics = {"accuracy": 0.5, "sharpness_12": 3.0, "sharpness_response": 0.25}
    save(tmp_path / "other", [record("padding=zero", 0, metrics=metrics)])
    options = [f"--results={tmp_path}/other"]
    head = cells(shown(swept[0], *options), "row")
    assert head[3:6] == ["ours: accuracy", "ours: sharpness_response", "provenance: seeds"]
    assert "sharpness_12" not in shown(swept[0], *options, kind="html").split("Provenance")[0]


def test_a_cell_with_a_bar_does_not_add_a_column(swept, tmp_path, shown):
    save(tmp_path / "other", [record("padding=zero", 0, device="a|b", metrics={"x|y": 1.0})])
    text = shown(swept[0], f"--results={tmp_path}/other")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert columns == {11} and len(lines) == 5
    assert r"a\|b" in text and r"ours: x\|y" in text


def test_other_scales_steps_and_overrides_are_separate_rows(swept, tmp_path, shown):
    changed = record("padding=zero", 0, overrides={"batch_size": 4}, metrics={"accuracy": 0.25})
    save(tmp_path / "a", [changed])
    save(tmp_path / "b", [record("padding=zero", 0, scale="tiny", metrics={"accuracy": 0.125})])
    places = f"--results={tmp_path}/a,{tmp_path}/b/results.jsonl"
    text = shown(*swept, places)
    assert cells(text, "padding=zero [batch_size=4]")[3:6] == ["0.25", "-", "0"]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| padding=zero ")]
    means = [line[3].strip() for line in lines if line[0].strip("| ") == "padding=zero"]
    assert means == ["0.6 ± 0.1", "0.125"]


def test_overrides_of_all_rows_are_a_note(swept, tmp_path, shown):
    both = {"batch_size": 4, "data.crop": [0.4, 1.0]}
    result = record("padding=zero", 0, overrides=both)
    save(tmp_path / "a", [result, record("padding=noisy", 0, overrides=both | {"steps": 9})])
    text = shown(swept[0], f"--results={tmp_path}/a")
    assert "All of ours with batch_size=4, data.crop=[0.4, 1.0].\n" in text
    assert cells(text, "padding=zero")[5] == "0"
    assert cells(text, "padding=noisy [steps=9]")[5] == "0"


def test_text_columns_are_aligned(swept, capsys):
    assert commands.report(*swept) == 0
    title, _, groups, names, rule, *rows = capsys.readouterr().out.splitlines()
    assert title == "Table X: padding <of> text & more."
    ends = [i for i, mark in enumerate(rule) if mark == "-" and rule[i + 1 : i + 2] in ("", " ")]
    assert len(ends) == 11
    for line in (names, *rows[:3]):
        assert all(line[end : end + 1] not in ("", " ") for end in ends[1:]), line
    for group, first in (("paper", "FID"), ("ours", "accuracy"), ("provenance", "seeds")):
        assert groups.index(group) + len(group) == names.index(first) + len(first)
    assert all(len(line) <= 100 for line in rows[3:])


def test_without_results_only_the_papers_numbers_are_shown(swept, shown):
    text = shown(swept[0])
    assert "No results of ours yet" in text and "ours" not in text.splitlines()[0]
    assert "<svg" not in shown(swept[0], kind="html")


def test_save_records_the_shown_results_for_later_reports(swept, tmp_path, shown):
    saved = tmp_path / "benchmarks" / "results" / "tableX.json"
    more = record("padding=noisy", 0, overrides={"init.path": "/home/me/old"})
    save(tmp_path / "more", [more, record("padding=gone", 0), record("a", 0, table="tableY")])
    text = shown(*swept, f"--results={tmp_path}/more", f"--save={saved}")
    saved_records = json.loads(saved.read_text())
    assert [(result["row"], result["seed"]) for result in saved_records] == [
        ("padding=a<b", 0), ("padding=a<b", 1), ("padding=noisy", 0),
        ("padding=zero", 0), ("padding=zero", 1),
    ]  # fmt: skip
    assert saved_records[2]["overrides"] == {"init.path": "old"}
    assert str(tmp_path) not in saved.read_text() and "/home" not in saved.read_text()
    assert {"sampling", "evaluation", "versions", "commit", "seconds"} <= set(saved_records[0])
    # A report without --results shows the recorded results.
    again = shown(swept[0])
    squeezed = [re.sub("[ -]+", " ", page) for page in (again, text.replace("/home/me/old", "old"))]
    assert squeezed[0] == squeezed[1]


def test_the_later_result_counts_but_a_failure_does_not_replace_one(tmp_path):
    failed = record("padding=zero", 0, status="failed", reason="disk")
    done = record("padding=zero", 0)
    for order, status in (([failed, done], "done"), ([done, failed], "done"), ([failed], "failed")):
        save(tmp_path / "one", order)
        (latest,) = results.read([tmp_path / "one"])
        assert latest["status"] == status
    save(tmp_path / "one", [done, done | {"metrics": {"accuracy": 1.0}}])
    assert results.read([tmp_path / "one"])[0]["metrics"] == {"accuracy": 1.0}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config: missing; give a table"),
        (["--config=configs/quickstart.py"], "no ROWS"),
        (["--config=tableA1"], "not a config file"),
        (["--config=configs/none.py"], "No such file"),
        (["--config=configs/tableA1.py", "--results=runs"], "is computed"),
        (["--config=configs/tableA1.py", "--workdir=runs"], "is computed"),
        (["--config=configs/table3.py", "--results=/no/such"], "no such file or folder"),
        (
            ["--config=configs/table3.py", "--out=x"],
            "unexpected argument '--out=x'; mode report has",
        ),
        (["--config=configs/table3.py", "--config.steps=2"], "unexpected argument"),
        (["--config=configs/table3.py", "--html=README.md/x.html"], "README.md/x.html: "),
        (["--results=a,b"], "takes several places only with --config"),
        (["--workdir=/no/such"], "is not a work directory or a .json of evaluations"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands.report(*arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
@pytest.mark.parametrize("name", ["evaluation.jsonl", "results-0.jsonl"])
def test_results_are_regular_files_of_their_folder(swept, tmp_path, capsys, name, plant):
    results_of = tmp_path / "results"
    results_of.mkdir()
    plant(results_of / name)
    table = [] if name.startswith("evaluation") else [swept[0]]
    assert commands.report(*table, f"--results={results_of}") == 2
    err = capsys.readouterr().err
    assert err == f"error: {results_of / name}: not a regular file of its folder; copy it there\n"
