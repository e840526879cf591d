"""Rows of the paper's tables at scale=tiny: lowered stage by stage, or trained and sampled.

Of rows that differ in numbers, curves or sizes only, one is tested, see `rows.settings`.
"""

import pytest

from tests import rows

LOWERED, TRAINED = rows.parameters(of_tables=True)


@pytest.mark.parametrize("name", LOWERED)
def test_rows_are_traced_and_lowered(name, emoji):
    with rows.small_models():
        rows.lower(rows.steps()[name])


@pytest.mark.parametrize("name", TRAINED)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(rows.groups()[name])
