"""Every row of the paper's tables, at scale=tiny: all stages are trained, and sampled."""

import pytest

from tests import rows

GROUPS = rows.groups(lambda name: name.startswith("table"))


@pytest.mark.parametrize("name", GROUPS)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(GROUPS[name])
