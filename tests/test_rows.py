"""Every row of the paper's tables, at scale=tiny: all stages are trained, and sampled."""

import pytest

from tests import rows

GROUPS = rows.groups(lambda name: name.startswith("table"))


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    process = rows.Trainer(tmp_path_factory.mktemp("rows"))
    yield process
    process.close()


@pytest.mark.parametrize("name", GROUPS)
def test_rows_train_and_sample(name, trainer):
    assert not trainer(GROUPS[name])
