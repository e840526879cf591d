"""benchmarks.plan: every cell of the table once, also after an interrupt."""

import json
import re
import sys

import pytest

from benchmarks import plan

GIB = {"parameters": 0.25, "average": 0.25, "optimizer": 0.5, "total": 3.0}
FIGURES = {"gib": GIB, "sending_seconds": 0.01}
TIMES = {"seconds": 0.5, "images_per_sec": 4096, "mfu": 0.25}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the command without compiling: (measured cells, cells in the file)."""

    def command(*arguments, stop=None):
        measured = []

        def measure(recipe, changes, name, times):
            if len(measured) == stop:
                raise KeyboardInterrupt
            measured.append((recipe, name, tuple(changes.items())))
            fits = name != "v5e-64"
            return FIGURES | {"fits": fits} | (TIMES if times and fits else {})

        monkeypatch.setattr(plan, "measure", measure)
        out = tmp_path / "cells.jsonl"
        monkeypatch.setattr(sys, "argv", ["plan", f"--out={out}", *arguments])
        try:
            plan.main()
        except KeyboardInterrupt:
            assert stop is not None
        return measured, [json.loads(line) for line in out.read_text().splitlines()]

    return command


def test_a_stopped_table_resumes(run):
    first, cells = run(stop=5)
    assert len(cells) == len(first) == 5
    rest, cells = run()
    each = len(plan.CHOICES) - 1  # UNets have no `dots`, the others need remat
    assert len(cells) == 5 + len(rest) == 4 * 8 * each
    assert len(set(first + rest)) == len(cells) == len({cell["name"] for cell in cells})
    assert run()[0] == []


@pytest.mark.parametrize("arch, remat", [("unet", {"block", "none"}), ("ours", {"block", "dots"})])
def test_a_part_of_the_table(run, arch, remat):
    measured, _ = run(f"--only=cc12m_512:arch={arch} v4-32")
    assert len(measured) == len(plan.CHOICES) - 1
    assert {(recipe, name) for recipe, name, _ in measured} == {(f"cc12m_512:arch={arch}", "v4-32")}
    assert {dict(changes)["model.remat"] for *_, changes in measured} == remat


def test_rows_name_cells_that_do_not_fit(run, capsys):
    run("--only=imagenet1k_256:arch=ours (v5e-64|v4-32) model.remat=dots parallel.fsdp=8")
    run("--table")
    rows = [re.split(r" *\| *", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    where = ["imagenet1k_256:arch=ours", "v5e-64", "latents", "dots", "8", "1.0"]
    assert rows[2] == [*where, "does not fit", "", "", "", ""]
    assert rows[3][1] == "v4-32"
    assert rows[3][6:] == ["3.0", "0.500", "0.010", "4096", "25%"]
    assert {len(row) for row in rows} == {11}


def test_times_are_added_to_cells_without_them(run, capsys):
    part = "--only=cc12m_256:arch=ours .* model.remat=block parallel.fsdp=8 data.name=latents"
    measured, cells = run("--no-times", part)
    assert len(measured) == len(cells) == 4 and not any("seconds" in cell for cell in cells)
    assert run("--no-times", part)[0] == []
    measured, _ = run(part)
    assert {name for _, name, _ in measured} == set(plan.SLICES) - {"v5e-64"}  # does not fit anyway
    assert run(part)[0] == run("--no-times", part)[0] == []
    run("--table")
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 4 and sum("| 0.500 |" in row for row in rows) == 3


def test_a_row_without_times(run, capsys):
    run("--no-times", "--only=cc12m_256:arch=unet v4-32 model.remat=block .*latents")
    run("--table")
    row = re.split(r" *\| *", capsys.readouterr().out.splitlines()[2])[1:-1]
    assert row[6:] == ["3.0", "", "0.010", "", ""]
