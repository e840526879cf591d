"""Table A1: every cell beside the paper's, parameters within 1% where the paper's size is known."""

import runpy
from pathlib import Path

import pytest

from condiff_jax import config as config_lib
from condiff_jax import report

ROOT = Path(__file__).parents[1]
TABLE = runpy.run_path(str(ROOT / "configs" / "tableA1.py"))
RECORDED = (ROOT / "docs" / "tableA1.md").read_text()


def recorded(row):
    """The cells of a row in docs/tableA1.md: for each value the paper's, ours, difference."""
    name = row.replace("arch=", "").replace("data=", "").replace("resolution=", "")
    line = next(line for line in RECORDED.splitlines() if line.startswith(f"| {name} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    return [cells[:3], cells[3:]]


@pytest.mark.parametrize("row", TABLE["ROWS"])
def test_cells_are_as_recorded_and_sizes_the_papers(row):
    ours = report.size_and_flop(config_lib.create(TABLE["get_config"](row)))
    paper = TABLE["PAPER"][row]
    for value, (_, cell, _) in zip(ours, recorded(row), strict=True):
        assert f"{value:.2f}" == cell
    if "dit_att" not in row:  # the paper does not say how it is built, see NOTES
        assert ours[0] == pytest.approx(paper[0], rel=0.01)
    if "imagenet1k" in row and "unet" not in row and "dit_att" not in row:
        assert ours[1] == pytest.approx(paper[1], rel=0.01)


def test_markdown_shows_paper_ours_and_difference():
    table = [("arch=a,data=b", (100.0, 20.0), (101.0, 15.0))]
    text = report.markdown(table, ("parameters", "GFLOP"), ["a: why"])
    assert "| a,b | 100 | 101.00 | +1.0% | 20 | 15.00 | -25.0% |" in text
    assert text.endswith("- a: why")


@pytest.mark.parametrize("row, paper", TABLE["PAPER"].items())
def test_every_large_difference_has_a_note(row, paper):
    for value, (theirs, ours, difference) in zip(paper, recorded(row), strict=True):
        change = float(ours) / value - 1
        assert float(theirs) == value
        assert float(difference.rstrip("%")) == pytest.approx(100 * change, abs=0.06)
        arch = row.split(",")[0].removeprefix("arch=")
        assert abs(change) < 0.01 or any(note.startswith(arch) for note in TABLE["NOTES"])
    assert all(note in RECORDED for note in TABLE["NOTES"])


@pytest.mark.parametrize("arguments", [[], ["configs/quickstart.py"], ["tableA1"]])
def test_bad_arguments_are_one_line(arguments, capsys):
    assert report.main(["report", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
