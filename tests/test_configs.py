"""Every row of every table config is a valid experiment of the architecture it names."""

import runpy
from pathlib import Path

import pytest

from condiff_jax import config as config_lib
from condiff_jax import summary
from condiff_jax.system import create

FOLDER = Path(__file__).parents[1] / "configs"
TABLES = {path.stem: runpy.run_path(str(path)) for path in sorted(FOLDER.glob("table*.py"))}
ROWS = [(name, row) for name, module in TABLES.items() for row in module["ROWS"]]


@pytest.mark.parametrize("name, row", ROWS)
def test_rows_are_valid(name, row):
    config = config_lib.create(TABLES[name]["get_config"](row))
    given = dict(item.split("=") for item in row.split(","))
    assert config.model.name == given["arch"]
    assert config.data.resolution == int(given["resolution"])
    assert config.data.semantics == ("text" if given["data"] == "cc12m" else "class")
    system = create(config, summary.vocabulary(config))
    side = int(given["resolution"]) // 8
    assert system.latent_shape == (side, side, 4)
    assert (system.model.classes or 0) == config.data.classes == (given["data"] != "cc12m") * 1000
    ours = given["arch"] == "ours"
    assert (config.conditioning.weighting == "cosine") == ours


def test_tables_compare_the_same_architectures():
    names = {module: {row.split(",")[0] for row in TABLES[module]["ROWS"]} for module in TABLES}
    assert names["table1"] == names["tableA1"] | {"arch=ours"}


@pytest.mark.parametrize(
    "args, message",
    [("data=cifar", "imagenet22k"), ("resolution=300", "choose from 256, 512"), ("x=1", "takes")],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        TABLES["table1"]["get_config"](args)
