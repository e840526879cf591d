"""Every row of every table is a valid experiment at every scale, and README.md lists them all."""

import math
import runpy

import pytest

from condiff_jax import config as config_lib
from condiff_jax import summary, transfer
from condiff_jax.system import create
from configs import recipes
from configs.__main__ import FOLDER, readme, tables
from tests import rows

TABLES = tables()
ROWS = [(name, row) for name, module in TABLES.items() for row in module["ROWS"]]
DATA = ("imagenet1k_256", "imagenet1k_512", "imagenet22k_256", "cc12m_256", "cc12m_512")


def config_of(name, args):
    module = runpy.run_path(str(FOLDER / f"{name}.py"))
    return config_lib.create(module["get_config"](args))


@pytest.mark.parametrize("name, row", [item for item in ROWS if item[0] in ("table1", "tableA1")])
def test_tables_of_architectures_build_what_they_name(name, row):
    config = config_of(name, row)
    given = dict(item.split("=") for item in row.split(","))
    assert config.model.name == given["arch"]
    assert config.data.resolution == int(given["resolution"])
    assert config.data.semantics == ("text" if given["data"] == "cc12m" else "class")
    system = create(config, summary.vocabulary(config))
    side = int(given["resolution"]) // 8
    assert system.latent_shape == (side, side, 4)
    assert (system.model.classes or 0) == config.data.classes == (given["data"] != "cc12m") * 1000
    assert (config.text_encoder.name == "clip") == (given["data"] == "cc12m")
    assert (config.conditioning.weighting == "cosine") == (given["arch"] == "ours")
    assert (config.init.pretrain is None) == (given["resolution"] == "256")


def test_tables_compare_the_same_architectures():
    names = {module: {row.split(",")[0] for row in TABLES[module]["ROWS"]} for module in TABLES}
    assert names["table1"] == names["tableA1"] | {"arch=ours"}


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"beyond_domains"}))  # needs files
def test_stages_of_the_papers_scale_fit_each_other(name):
    seen = set()
    for row in TABLES[name]["ROWS"]:
        config = rows.build(TABLES[name], name, row)
        earlier = config.init.pretrain
        if earlier is None or rows.key(config) in seen:
            continue
        seen.add(rows.key(config))
        old, new = (create(stage, summary.vocabulary(stage)) for stage in (earlier, config))
        assert transfer.plan(old, new)


@pytest.mark.parametrize("scale", recipes.SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_valid_and_differ(name, scale):
    configs = [
        rows.build(TABLES[name], name, row, f"scale={scale}") for row in TABLES[name]["ROWS"]
    ]
    assert len({config.to_json() for config in configs}) == len(configs)


@pytest.mark.parametrize("scale", ["small", "tiny"])
@pytest.mark.parametrize("name", TABLES)
def test_smaller_scales_differ_where_the_paper_does(name, scale):
    def differing(scale):
        built = [
            rows.build(TABLES[name], name, row, f"scale={scale}") for row in TABLES[name]["ROWS"]
        ]
        flat = [config_lib.identity(config) | {"steps": config.steps} for config in built]
        fields = set().union(*flat)
        return {f for f in fields if len({repr(fields_of.get(f)) for fields_of in flat}) > 1}

    # A UNet has no patches and no scan; batches differ by what fits, but in a table about them;
    # the small scales encode all captions in words.
    derived = {"model.size", "model.unroll", "text_encoder.name"}
    derived |= {"batch_size"} if name != "tableA2" else set()
    assert differing("paper") - differing(scale) <= derived


@pytest.mark.parametrize("name, row", ROWS)
def test_smaller_scales_need_no_files(name, row):
    for stage in config_lib.stages(rows.build(TABLES[name], name, row, "scale=small")):
        assert stage.autoencoder.name == "pixels" and stage.text_encoder.name == "words"
        assert not stage.init.path
        if name != "beyond_domains":
            assert stage.data.name == "shapes" and not stage.data.path


@pytest.mark.parametrize("name, module", TABLES.items())
def test_published_numbers_are_numbers(name, module):
    assert tuple(module["PAPER"]) == module["ROWS"]
    assert all(isinstance(note, str) for note in module["NOTES"])
    for cells in module["PAPER"].values():
        for value in cells.values():
            assert value is None or math.isnan(value) or value > 0
        assert name.startswith("beyond") == (not cells)


@pytest.mark.parametrize(
    "row, guidance",
    [("resolution=256,guidance=1.5", 1.5), ("resolution=512,guidance=2.0", 2.0)],
)
def test_fig7_takes_guidance_as_it_is(row, guidance):
    assert config_of("fig7", row).sampling.guidance == guidance
    assert config_of("fig7", row).sampling.base_resolution == 0


@pytest.mark.parametrize("name", ["table2b", "fig7"])
def test_rows_that_differ_in_sampling_share_their_training(name):
    module = TABLES[name]
    trained = {rows.key(rows.build(module, name, row, "scale=small")) for row in module["ROWS"]}
    assert len(trained) == 2


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("init", ["none", "low_res", "imagenet1k", "imagenet22k"])
@pytest.mark.parametrize("scale", recipes.SCALES)
def test_data_sets_start_from_what_they_can(name, init, scale):
    args = f"arch=mmdit,init={init},scale={scale}"
    if name.startswith(init) or (init == "low_res" and name.endswith("256")):
        with pytest.raises(ValueError, match="choose from none"):
            config_of(name, args)
        return
    config = config_of(name, args)
    assert (config.init.pretrain is None) == (init == "none")
    low = config.init.pretrain and config.init.pretrain.data.resolution < config.data.resolution
    assert bool(low) == (init == "low_res")


def test_tableA2_keeps_the_ratios_of_rates_and_batches():
    names = ("optimizer.learning_rate", "batch_size")
    configs = {
        scale: [config_of("tableA2", f"{row},scale={scale}") for row in TABLES["tableA2"]["ROWS"]]
        for scale in ("paper", "small")
    }
    for field in names:
        paper, small = ([config_lib.get(c, field) for c in configs[s]] for s in ("paper", "small"))
        assert [v / paper[0] for v in paper] == pytest.approx([v / small[0] for v in small])


def test_figA2_keeps_its_momenta():
    config = config_of("figA2", "b1=0.95,b2=0.999,scale=small")
    assert (config.optimizer.b1, config.optimizer.b2) == (0.95, 0.999)


def test_ladder_of_transfer_ends_with_ours_of_table1():
    last = config_of("tableA3", "ladder=transfer,step=5,data=cc12m")
    ours = config_of("table1", "arch=ours,data=cc12m,resolution=512")
    assert last == ours


def test_ladder_of_conditioning_ends_with_ours_of_table1():
    last = config_of("tableA3", "ladder=conditioning,step=7,data=cc12m")
    ours = config_of("table1", "arch=ours,data=cc12m,resolution=256")
    assert last == ours


@pytest.mark.parametrize(
    "args, message",
    [
        ("data=cifar", "imagenet22k"),
        ("resolution=300", "choose from 256, 512"),
        ("scale=huge", "choose from paper, small, tiny"),
        ("x=1", "takes"),
    ],
)
def test_bad_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        TABLES["table1"]["get_config"](args)


def test_readme_is_up_to_date():
    text = (FOLDER / "README.md").read_text()
    assert text == readme(), "run: python -m configs > configs/README.md"
    assert all(f"`{name}.py:{row}`" in text for name, row in ROWS)
