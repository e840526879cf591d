"""Rows of the paper's figures and of other configs at scale=tiny; see test_rows.py.

This is a file of its own so that both run in parallel.
"""

import pytest

from tests import rows

LOWERED, TRAINED = rows.parameters(of_tables=False)


@pytest.mark.parametrize("name", LOWERED)
def test_rows_are_traced_and_lowered(name, emoji):
    with rows.small_models():
        rows.lower(rows.steps()[name])


@pytest.mark.parametrize("name", TRAINED)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(rows.groups()[name])
