"""Every row of every table is a valid config at every scale, and README.md lists all rows."""

import dataclasses
import functools
import json
import math
import runpy

import pytest

from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import identity, stages
from condiff_jax.models import unet
from condiff_jax.objectives import summary
from condiff_jax.objectives.diffusion import create
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import load_vocabulary
from condiff_jax.sampling.requests import guidance_scale
from condiff_jax.training import transfer
from configs import recipes
from configs.__main__ import FOLDER, readme, tables
from tests import rows

TABLES = tables()
ROWS = [(name, row) for name, module in TABLES.items() for row in module["ROWS"]]
DATA = ("imagenet1k_256", "imagenet1k_512", "imagenet22k_256", "cc12m_256", "cc12m_512")


@functools.cache
def module_of(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


def config_of(name, args):
    return create_config(module_of(name)["get_config"](args))


@functools.cache
def build(name, row, *arguments):
    return rows.build(TABLES[name], name, row, *arguments)


SHAPES = {}  # cached shapes of objectives, as tracing a UNet takes a second


def with_shapes(config):
    """The objective, with shapes of parameters cached by the settings they depend on."""
    objective = create(config, load_vocabulary(config))
    parts = config.model, config.conditioning, config.text_encoder, config.autoencoder
    key = repr((parts, config.data.semantics, config.data.classes, config.data.resolution))
    if key not in SHAPES:
        SHAPES[key] = objective.shapes
    objective.__dict__["shapes"] = SHAPES[key]  # sets the cached property
    return objective


@pytest.mark.parametrize("name, row", [item for item in ROWS if item[0] in ("table1", "tableA1")])
def test_tables_of_architectures_build_what_they_name(name, row):
    config = config_of(name, row)
    values = dict(item.split("=") for item in row.split(","))
    assert config.model.name == values["arch"]
    assert config.data.resolution == int(values["resolution"])
    assert config.data.semantics == ("text" if values["data"] == "cc12m" else "class")
    objective = create(config, load_vocabulary(config))
    side = int(values["resolution"]) // 8
    assert objective.latent_shape == (side, side, 4)
    assert (
        (objective.model.classes or 0) == config.data.classes == (values["data"] != "cc12m") * 1000
    )
    assert (config.text_encoder.name == "clip") == (values["data"] == "cc12m")
    assert (config.conditioning.weighting == "cosine") == (values["arch"] == "ours")
    assert (config.init.pretrain is None) == (values["resolution"] == "256")


def test_tables_compare_the_same_architectures():
    names = {module: {row.split(",")[0] for row in TABLES[module]["ROWS"]} for module in TABLES}
    assert names["table1"] == names["tableA1"] | {"arch=ours"}


@pytest.mark.parametrize("name", sorted(set(TABLES) - {"beyond_domains"}))  # needs files
def test_stages_of_the_papers_scale_fit_each_other(name, monkeypatch):
    """UNets have one ResNet block a level here, as tracing the full ones takes long."""
    for size, settings in unet.SIZES.items():
        monkeypatch.setitem(unet.SIZES, size, dataclasses.replace(settings, resnets=1))
    seen = set()
    for row in TABLES[name]["ROWS"]:
        config = build(name, row)
        earlier = config.init.pretrain
        if earlier is None or rows.key(config) in seen:
            continue
        seen.add(rows.key(config))
        assert transfer.plan(with_shapes(earlier), with_shapes(config))


@pytest.mark.parametrize("scale", recipes.SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_rows_are_valid_and_differ(name, scale):
    configs = [build(name, row, f"scale={scale}") for row in TABLES[name]["ROWS"]]
    assert len({config.to_json() for config in configs}) == len(configs)


@pytest.mark.parametrize("scale", ["small", "tiny"])
@pytest.mark.parametrize("name", TABLES)
def test_smaller_scales_differ_where_the_paper_does(name, scale):
    def differing(scale):
        built = [build(name, row, f"scale={scale}") for row in TABLES[name]["ROWS"]]
        flat = [identity(config) | {"steps": config.steps} for config in built]
        fields = set().union(*flat)
        return {f for f in fields if len({repr(fields_of.get(f)) for fields_of in flat}) > 1}

    # A UNet has no patches and no scan. Batch sizes depend on memory, except in the table about
    # them. Smaller scales use the word encoder for all captions.
    derived = {"model.size", "model.unroll", "text_encoder.name"}
    derived |= {"batch_size"} if name != "tableA2" else set()
    assert differing("paper") - differing(scale) <= derived


@pytest.mark.parametrize("name, row", ROWS)
def test_smaller_scales_need_no_files(name, row):
    for stage in stages(build(name, row, "scale=small")):
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
    trained = {rows.key(build(name, row, "scale=small")) for row in module["ROWS"]}
    assert len(trained) == 2


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("init", ["none", "low_res", "imagenet1k", "imagenet22k"])
@pytest.mark.parametrize("scale", recipes.SCALES)
def test_data_sets_start_from_the_listed_stages(name, init, scale):
    args = f"arch=mmdit,init={init},scale={scale}"
    if name.startswith(init) or (init == "low_res" and name.endswith("256")):
        with pytest.raises(ValueError, match="choose from none"):
            config_of(name, args)
        return
    config = config_of(name, args)
    assert (config.init.pretrain is None) == (init == "none")
    low = config.init.pretrain and config.init.pretrain.data.resolution < config.data.resolution
    assert bool(low) == (init == "low_res")


def test_table_a2_keeps_the_ratios_of_rates_and_batches():
    names = ("optimizer.learning_rate", "batch_size")
    configs = {
        scale: [config_of("tableA2", f"{row},scale={scale}") for row in TABLES["tableA2"]["ROWS"]]
        for scale in ("paper", "small")
    }
    for field in names:
        paper, small = ([get(c, field) for c in configs[s]] for s in ("paper", "small"))
        assert [v / paper[0] for v in paper] == pytest.approx([v / small[0] for v in small])


def test_fig_a2_keeps_its_momenta():
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


# Literal values, so that tests detect any change of recipes.py. All rows and stages at the paper's
# scale have these (Sec. 3.1, App. C; latents of Stable Diffusion), except what a table is ABOUT.
EVERYWHERE = {
    "optimizer.name": "adam", "optimizer.learning_rate": 1e-4, "optimizer.schedule": "constant",
    "optimizer.b1": 0.9, "optimizer.b2": 0.999,
    "diffusion.timesteps": 1000, "diffusion.schedule": "scaled_linear",
    "diffusion.beta_start": 0.00085, "diffusion.beta_end": 0.012,
    "diffusion.prediction": "epsilon",
    "model.dtype": "bfloat16", "model.qk_norm": True, "model.base_resolution": 256,
    "autoencoder.name": "kl", "autoencoder.size": "sd", "autoencoder.scale": 0.18215,
    "text_encoder.length": 77, "text_encoder.width": 768,
    "sampling.sampler": "ddim", "sampling.eta": 0.0,
    "evaluation.samples": 50_000, "evaluation.size_prompts": 10_000,
    "evaluation.sizes": (64, 128, 256, 512, 1024), "data.flip": True,
}  # fmt: skip
ABOUT = {
    "tableA2": {"optimizer.learning_rate", "batch_size"},
    "figA2": {"optimizer.b1", "optimizer.b2"},
}
BATCH = {256: 2048, 512: 384}  # by resolution, Sec. 3.1
GUIDANCE = {256: 1.5, 512: 2.0}  # App. C
GLOBAL, LOCAL, MIX = (0.9, 1.0), (0.4, 0.6), (0.4, 1.0)  # Sec. 3.4
# Settings of the baselines and of the paper's model.
BASE = {
    "conditioning.control": ("crop", "size"), "conditioning.weighting": "uniform",
    "conditioning.padding": "zero", "model.position": "extrapolate", "data.crop": GLOBAL,
    "diffusion.base_resolution": 0, "sampling.control_guidance": 1.0, "data.entangled": 0.0,
}  # fmt: skip
OURS = {
    "conditioning.control": ("crop", "flip", "size"), "conditioning.weighting": "cosine",
    "conditioning.alpha": 8.0, "conditioning.padding": "noisy_replicate",
    "model.position": "resample", "data.crop": GLOBAL, "diffusion.base_resolution": 256,
    "sampling.control_guidance": 1.375, "data.entangled": 0.0,
}  # fmt: skip
CLASSES = {"data.semantics": "class", "data.classes": 1000, "evaluation.reference": "train"}
MORE = {"data.semantics": "class", "data.classes": 21_841, "evaluation.reference": "train_200k"}
CAPTIONS = {"data.semantics": "text", "data.classes": 0, "evaluation.reference": "validation"}
CAPTIONS |= {"text_encoder.name": "clip"}
LONG = {"steps": 500_000, "sampling.steps": 250, "sampling.size": "train", "sampling.ema": True}
SHORT = {"sampling.steps": 50, "evaluation.reference": "validation"}  # Figs. 8 and A2


def before(fields):
    """Prefix fields with the name of the earlier stage."""
    return {f"init.pretrain.{name}": value for name, value in fields.items()}


_LOW = {"data.resolution": 256, "init.pretrain": None}
_HIGH = {"data.resolution": 512, "steps": 130_000}
_WEIGHTED = OURS | CLASSES | _LOW | {
    "steps": 120_000, "sampling.steps": 250, "sampling.size": "train", "model.name": "ours",
    "sampling.control_guidance": 1.0, "data.entangled": 0.9,  # data.entangled: `shapes` only
}  # fmt: skip
_SHIFT = OURS | _HIGH | SHORT | before(OURS | CLASSES | _LOW | {"data.crop": LOCAL})
_SHIFT |= {"init.pretrain.steps": 500_000, "data.classes": 1000}
_FIRST = before(BASE | CLASSES | _LOW | {"steps": 600_000})  # Sec. 3.4
_FLIPPED = OURS | CAPTIONS | _LOW | {"steps": 124_000, "conditioning.padding": "zero"}
_DITS = ("dit_ln", "dit_att", "mdtv2", "pixart", "mmdit")
_LADDER = BASE | _LOW | {"sampling.size": "train", "model.name": "ours"}
_RUNGS = OURS | CAPTIONS | _HIGH | {"model.name": "ours"}
_PLAIN = {"model.position": "extrapolate", "diffusion.base_resolution": 0}
_RESAMPLED = {"model.position": "resample", "diffusion.base_resolution": 0}

PINNED = {
    **{
        f"table1:arch={arch},data=imagenet1k,resolution=256":
            BASE | CLASSES | LONG | _LOW | {"model.name": arch, "model.size": size}
        for arch, size in (("unet", "class"), *((arch, "XL/2") for arch in _DITS))
    },
    **{
        f"table1:arch={arch},data=imagenet1k,resolution=512":
            BASE | CLASSES | _HIGH | before(BASE | CLASSES | LONG | _LOW)
        for arch in ("unet", *_DITS)
    },
    **{
        f"table1:arch={arch},data=cc12m,resolution=256":
            BASE | CAPTIONS | LONG | _LOW | {"steps": 300_000, "model.size": size}
        for arch, size in (("unet", "text"), ("dit_att", "XL/2"), ("pixart", "XL/2"))
    },
    "table1:arch=mmdit,data=cc12m,resolution=512":
        BASE | CAPTIONS | _HIGH | before(BASE | CAPTIONS | _LOW | {"steps": 300_000}),
    "table1:arch=ours,data=imagenet1k,resolution=256":
        OURS | CLASSES | LONG | _LOW | {"model.name": "ours", "model.size": "XL/2"},
    "table1:arch=ours,data=imagenet1k,resolution=512":
        OURS | CLASSES | _HIGH | before(OURS | CLASSES | LONG | _LOW | {"data.crop": LOCAL}),
    "table1:arch=ours,data=cc12m,resolution=256":
        OURS | CAPTIONS | LONG | _LOW | {"steps": 300_000},
    "table1:arch=ours,data=cc12m,resolution=512":
        OURS | CAPTIONS | _HIGH
        | before(OURS | CAPTIONS | _LOW | {"data.crop": LOCAL, "steps": 300_000}),
    "table2a:weighting=zero": _WEIGHTED | {"conditioning.weighting": "zero"},
    "table2a:weighting=unif": _WEIGHTED | {"conditioning.weighting": "uniform"},
    **{
        f"table2a:weighting=cos{alpha}": _WEIGHTED | {"conditioning.alpha": float(alpha)}
        for alpha in (1, 2, 4, 8)
    },
    "tableA6:weighting=linear": _WEIGHTED | {"conditioning.weighting": "linear"},
    **{
        f"tableA6:weighting=step{k}":
            _WEIGHTED | {"conditioning.weighting": "step", "conditioning.k": float(k)}
        for k in (1, 2, 6)
    },
    "table2b:size=512,weighting=cos8": _WEIGHTED | {
        "sampling.size": "fixed", "sampling.control.height": 512.0, "sampling.control.width": 512.0,
    },
    "table2b:size=tied,weighting=cos8":
        _WEIGHTED | {"sampling.size": "tied", "sampling.size_range": (512, 1024)},
    "table2b:size=untied,weighting=unif": _WEIGHTED | {
        "sampling.size": "untied", "sampling.size_range": (512, 1024),
        "conditioning.weighting": "uniform",
    },
    "table2b:size=train,weighting=cos8": _WEIGHTED,
    "table2c:control=crop":
        _FLIPPED | {"conditioning.control": ("crop",)},
    "table2c:control=crop+flip":
        _FLIPPED | {"conditioning.control": ("crop", "flip")},
    **{
        f"table3:padding={padding}": OURS | CAPTIONS | _LOW | {"conditioning.padding": padding}
        for padding in ("zero", "replicate", "noisy_replicate")
    },
    "table4a:init=none,data=imagenet22k,steps=375": BASE | MORE | _LOW | {"steps": 375_000},
    **{
        f"table4a:init=imagenet1k,data=imagenet22k,steps={k}":
            BASE | MORE | {"data.resolution": 256, "steps": 1000 * k} | _FIRST
        for k in (80, 110)
    },
    "table4a:init=none,data=cc12m,steps=600": BASE | CAPTIONS | _LOW | {"steps": 600_000},
    **{
        f"table4a:init=imagenet1k,data=cc12m,steps={k}":
            BASE | CAPTIONS | {"data.resolution": 256, "steps": 1000 * k} | _FIRST
        for k in (60, 100, 120)
    },
    "table4b:pretrain=200,finetune=150":
        BASE | CAPTIONS | {"data.resolution": 512, "steps": 150_000}
        | before(BASE | MORE | {"data.resolution": 512, "steps": 200_000}),
    "table4c:arch=unet,init=none": BASE | CLASSES | {"init.pretrain": None},
    "table4c:arch=mmdit,init=low_res": BASE | CLASSES | _HIGH | before(BASE | CLASSES | _LOW),
    "fig7:resolution=256,control_guidance=1.375": OURS | CLASSES | LONG | _LOW,
    "fig7:resolution=512,guidance=2.0":
        OURS | CLASSES | _HIGH | {"sampling.control_guidance": 1.0, "sampling.steps": 250},
    "fig8a:position=resample": _SHIFT,
    "fig8a:position=extrapolate": _SHIFT
        | {"model.position": "extrapolate", "init.pretrain.model.position": "extrapolate"},
    "fig8b:rescale=true": _SHIFT | {"steps": 40_000},
    "fig8b:rescale=false": _SHIFT | {"steps": 40_000, "diffusion.base_resolution": 0},
    **{
        f"fig8c:crop={name},resolution=512": _SHIFT | {"init.pretrain.data.crop": crop}
        for name, crop in (("global", GLOBAL), ("local", LOCAL), ("mix", MIX))
    },
    **{
        f"fig8c:crop={name},resolution=256": OURS | LONG | _LOW | SHORT | {"data.crop": crop}
        for name, crop in (("global", GLOBAL), ("local", LOCAL), ("mix", MIX))
    },
    "tableA2:learning_rate=1e-4,batch=2048": BASE | CLASSES | _LOW | {
        "steps": 70_000, "sampling.ema": False, "sampling.steps": 250, "model.name": "dit_ln",
        "batch_size": 2048, "optimizer.learning_rate": 1e-4,
    },
    "tableA2:learning_rate=2e-4,batch=512":
        {"batch_size": 512, "optimizer.learning_rate": 2e-4, "sampling.ema": False},
    "figA2:b1=0.9,b2=0.95": BASE | CLASSES | _LOW | SHORT | {
        "steps": 70_000, "model.name": "unet", "optimizer.b1": 0.9, "optimizer.b2": 0.95,
    },
    "tableA3:ladder=conditioning,step=1,data=imagenet1k":
        _LADDER | CLASSES | {"model.name": "dit_ln", "conditioning.control": ()},
    "tableA3:ladder=conditioning,step=2,data=imagenet1k":
        _LADDER | CLASSES | {"model.name": "mmdit", "conditioning.control": ()},
    "tableA3:ladder=conditioning,step=3,data=imagenet1k":
        _LADDER | CLASSES | {"model.name": "mmdit"},
    "tableA3:ladder=conditioning,step=4,data=imagenet1k": OURS | CLASSES | _LOW | {
        "conditioning.control": ("crop", "size"), "conditioning.padding": "zero",
        "sampling.control_guidance": 1.0,
    },
    "tableA3:ladder=conditioning,step=5,data=cc12m": OURS | CAPTIONS | _LOW | {
        "conditioning.control": ("crop", "size"), "conditioning.padding": "zero",
    },
    "tableA3:ladder=conditioning,step=6,data=cc12m":
        OURS | CAPTIONS | _LOW | {"conditioning.padding": "zero"},
    "tableA3:ladder=conditioning,step=7,data=cc12m": OURS | CAPTIONS | _LOW,
    "tableA3:ladder=transfer,step=1,data=cc12m":
        _RUNGS | _PLAIN | {"steps": 300_000, "init.pretrain": None},
    "tableA3:ladder=transfer,step=2,data=cc12m":
        _RUNGS | _PLAIN | before(_PLAIN | {"data.crop": GLOBAL}),
    "tableA3:ladder=transfer,step=3,data=cc12m":
        _RUNGS | _PLAIN | before(_PLAIN | {"data.crop": LOCAL}),
    "tableA3:ladder=transfer,step=4,data=cc12m":
        _RUNGS | _RESAMPLED | before(_RESAMPLED | {"data.crop": LOCAL}),
    "tableA3:ladder=transfer,step=5,data=cc12m": _RUNGS | before({"data.crop": LOCAL}),
}  # fmt: skip


@pytest.mark.parametrize("row", PINNED)
def test_rows_are_what_the_paper_says(row):
    name, _, row = row.partition(":")
    assert row in TABLES[name]["ROWS"]
    config = build(name, row)
    expected = PINNED[f"{name}:{row}"]
    assert {field: get(config, field) for field in expected} == expected


@pytest.mark.parametrize("name", [name for name in TABLES if name.startswith(("table", "fig"))])
def test_all_rows_have_the_papers_recipe(name):
    about = ABOUT.get(name, set())
    expected = {field: value for field, value in EVERYWHERE.items() if field not in about}
    for row in TABLES[name]["ROWS"]:
        for stage in stages(build(name, row)):
            assert {field: get(stage, field) for field in expected} == expected, row
            resolution = stage.data.resolution
            assert "batch_size" in about or stage.batch_size == BATCH[resolution], row
            if name != "fig7":
                assert guidance_scale(stage.sampling, resolution) == GUIDANCE[resolution], row


@pytest.mark.parametrize(
    "size, batch, published", [("small", 128, 19.39), ("medium", 128, 11.5), ("large", 64, 10.52)]
)
def test_cifar10_benchmark_is_what_its_page_says(size, batch, published):
    row = f"method=film,size={size}"
    assert TABLES["cifar10_conditioning"]["PAPER"][row] == {"fid": published}
    config = config_of("cifar10_conditioning", row)
    expected = {
        "steps": 35_000, "batch_size": batch, "optimizer.name": "adamw",
        "optimizer.learning_rate": 2e-4, "optimizer.ema": 0.9995, "model.name": "unet2d",
        "model.size": size, "data.name": "cifar10", "data.resolution": 32, "data.classes": 10,
        "data.crop": (1.0, 1.0), "data.flip": False, "conditioning.control": (),
        "conditioning.drop_semantics": 0.0, "diffusion.timesteps": 1000,
        "diffusion.schedule": "linear", "diffusion.beta_start": 1e-4, "diffusion.beta_end": 0.02,
        "diffusion.prediction": "epsilon", "sampling.sampler": "ddim", "sampling.steps": 50,
        "sampling.guidance": 1.0, "sampling.eta": 0.0, "evaluation.metrics": ("fid",),
        "evaluation.samples": 50_000, "evaluation.reference": "train",
        "evaluation.resize": "clean", "autoencoder.name": "pixels",
    }  # fmt: skip
    assert {field: get(config, field) for field in expected} == expected


@pytest.mark.parametrize("data, steps", [("imagenet22k", 375_000), ("imagenet1k", 600_000)])
def test_data_sets_start_from_as_many_steps_as_in_table4a(data, steps):
    config = config_of("cc12m_256", f"arch=mmdit,init={data}")
    assert (config.steps, config.init.pretrain.steps) == (300_000, steps)


@pytest.mark.parametrize("scale", ["small", "tiny"])
@pytest.mark.parametrize("name", TABLES)
def test_smaller_scales_sample_sizes_that_the_data_have(name, scale):
    for row in TABLES[name]["ROWS"]:
        config = build(name, row, f"scale={scale}")
        low, high = config.data.sizes
        sampled, control = config.sampling.size_range, config.sampling.control
        assert low <= config.data.resolution <= sampled[0] < sampled[1] <= high
        assert all(low <= size <= high for size in config.evaluation.sizes)
        size = 32.0 if "size=512" in row else 0.0
        assert (control.height, control.width) == (size, size)


@pytest.mark.parametrize("scale", ["small", "tiny"])
def test_smaller_scales_keep_what_tables_are_about(scale):
    table2a = config_of("table2a", f"weighting=cos8,scale={scale}")
    assert table2a.data.entangled == 0.9 and table2a.data.sizes == (12, 48)
    tableA2 = config_of("tableA2", f"learning_rate=1e-4,batch=512,scale={scale}")
    assert (tableA2.batch_size, tableA2.sampling.ema) == (8, False)
    for args, reference in (
        ("table1:arch=ours,data=cc12m,resolution=256", "validation"),
        ("table1:arch=ours,data=imagenet1k,resolution=256", "train"),
        ("table4a:init=none,data=imagenet22k,steps=375", "train"),
        ("fig8b:rescale=true", "validation"),
    ):
        name, _, row = args.partition(":")
        assert config_of(name, f"{row},scale={scale}").evaluation.reference == reference


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


@pytest.mark.parametrize(
    "args, fields, message",
    [
        ("data=imagenet1k,resolution=256", {}, "data.path: empty, but data.name=tfds"),
        ("", {"data.path": "DATA"}, "autoencoder.path: empty"),
        (
            "data=cc12m",
            {"data.path": "DATA", "autoencoder.path": "VAE"},
            "text_encoder.path: empty",
        ),
        (
            "resolution=512",
            {"data.path": "DATA", "autoencoder.path": "VAE"},
            "init.pretrain.data.path: empty",
        ),
        (
            "",
            {
                "data.path": "DATA",
                "autoencoder.path": "VAE",
                "evaluation.metrics": ("fid",),
            },
            "evaluation.inception: empty",
        ),
    ],
)
def test_summary_of_a_run_names_the_field_that_it_lacks(args, fields, message):
    values = TABLES["table1"]["get_config"](",".join(filter(None, ("arch=ours", args))))
    values.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=f"^{message}"):
        summary.run(create_config(values), "WORKDIR")


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_summary_of_other_objectives_counts_what_is_trained(name, capsys):
    config = config_of(name, "")
    summary.run(config, "WORKDIR")
    *_, total, line = capsys.readouterr().out.splitlines()
    assert f"{json.loads(line)['parameters']:,}" in total and json.loads(line)["gflop_forward"] > 0


def test_summary_works_without_the_data(capsys):
    values = TABLES["table1"]["get_config"]("arch=ours")
    values.update_from_flattened_dict({"data.path": "DATA", "autoencoder.path": "VAE"})
    summary.run(create_config(values), "WORKDIR")
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == "Without the data: data.path=DATA is not on this machine"
