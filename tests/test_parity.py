"""Every architecture equals its original, and the recorded table has every comparison."""

import json

import pytest

from benchmarks import parity


@pytest.mark.parametrize("side", parity.SIDES)
@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: f"{case.name}-{case.original}")
def test_equals_the_original(case, side):
    output, gradient = parity.compare(case, side)
    assert output < 1e-4
    assert gradient < 1e-3


def test_record_has_every_case():
    rows = json.loads(parity.RESULTS.read_text())["rows"]
    recorded = [(row["architecture"], row["reference"]) for row in rows]
    assert recorded == [(case.name, case.original) for case in parity.CASES]
    assert all(row["output"] < 1e-4 and row["gradient"] < 1e-3 for row in rows)
