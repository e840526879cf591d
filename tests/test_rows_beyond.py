"""The rows of the paper's figures and beyond it, at scale=tiny; see test_rows.py.

A file of its own, so that tests in parallel take both at once.
"""

import pytest

from tests import rows

GROUPS = {name: same for name, same in rows.groups().items() if not name.startswith("table")}


@pytest.mark.parametrize("name", GROUPS)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(GROUPS[name])
