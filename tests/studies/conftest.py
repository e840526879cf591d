"""Fixtures: a table with results, and reports of it."""

import pytest

from tests.studies import commands
from tests.studies.records import PNG, record, save

SWEPT = '''
"""Table X: padding <of> text & more."""
PAPER = {
    "padding=zero": {"FID": 3.0, "CLIP": None},
    "padding=a<b": {"FID": float("nan"), "CLIP": 26.6},
    "padding=noisy": {"FID": 2.75},
}
ROWS = tuple(PAPER)
NOTES = ("beta is 'small' & more",)
CITED = {"another [1]": {"FID": 4.5}}
'''


@pytest.fixture
def swept(tmp_path):
    """--config and --workdir of a table with rows of two seeds, a diverged seed, no results."""
    config, workdir = tmp_path / "configs" / "tableX.py", tmp_path / "runs"
    config.parent.mkdir()
    config.write_text(SWEPT)
    bad = record("padding=a<b", 1, status="diverged", reason="step 3: <loss> nan")
    save(workdir, [record("padding=zero", 1), record("padding=zero", 0)], "results-0.jsonl")
    save(workdir, [record("padding=a<b", 0), bad], "results-1.jsonl")
    samples = workdir / record("padding=zero", 0)["folder"] / "samples"
    samples.mkdir(parents=True)
    (samples / "1-sizes.png").write_bytes(PNG)
    return f"--config={config}", f"--workdir={workdir}"


@pytest.fixture
def shown(tmp_path):
    """Write a report as Markdown or another kind of file, and return its text."""

    def show(*arguments, kind="markdown"):
        path = tmp_path / "site" / "shown"
        assert commands.report(f"--{kind}={path}", *arguments) == 0
        return path.read_text()

    return show
