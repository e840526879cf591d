"""The rows of the paper's figures and beyond it, at scale=tiny; see test_rows.py.

A file of its own, so that tests in parallel take both at once.
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
