"""The rows of the paper's tables, at scale=tiny: all stages are trained, and sampled.

Of those that differ in numbers, curves or sizes alone, one: `rows.settings`.
"""

import pytest

from tests import rows

GROUPS = {name: same for name, same in rows.groups().items() if name.startswith("table")}


@pytest.mark.parametrize("name", GROUPS)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(GROUPS[name])
