"""Validation: bad values are errors that name the field and the fix; good ones round-trip."""

import json
import re

import pytest

from condiff_jax import config as config_lib
from condiff_jax.config import ConfigError
from configs import base
from tests import tiny


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model.name", "sit", "choose from unet, unet2d, .*, mmdit, ours"),
        ("model.size", "XXL/2", "model.size"),
        ("model.size", "XL", "NAME/PATCH"),
        ("data.resolution", 18, "data.resolution=18 must be a multiple of 4"),
        ("model.base_resolution", 30, "model.base_resolution"),
        ("model.attention", "cudnn", "bfloat16"),
        ("profile", (3,), "a first and a last step"),
        ("profile", (3, 2), "a first and a last step"),
        ("data.crop", (0.9, 0.5), "data.crop"),
        ("data.crop", (0.9,), "data.crop"),
        ("data.sizes", (4, 96), "data.sizes"),
        ("model.mask_ratio", 0.9, "between 0 and 0.8"),
        ("autoencoder.size", "huge", "choose from tiny, sd"),
        ("conditioning.control", ("crop", "zoom"), "zoom"),
        ("conditioning.drop_control", 1.5, "between 0 and 1"),
        ("optimizer.accumulate", 3, "optimizer.accumulate=3"),
        ("diffusion.beta_start", 0.5, "beta_start"),
        ("sampling.steps", 1001, "diffusion.timesteps"),
        ("steps", 0, "steps must be at least 1"),
        ("steps", "many", "steps must be of type int"),
        ("optimizer.ema_warmup", 1, "type bool"),
    ],
)
def test_bad_values_name_the_field(field, value, named):
    values = tiny.values().to_dict()
    *path, last = field.split(".")
    section = values
    for part in path:
        section = section[part]
    section[last] = value
    with pytest.raises(ConfigError, match=named) as error:
        config_lib.create(values)
    assert field.split(".")[-1] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.name": "pixart", "model.streams": "full"}, "model.streams must be auto"),
        ({"model.name": "dit_ln"}, "dit_ln knows classes only; set data.semantics=class"),
        ({"model.name": "unet"}, "model.size='tiny/4' is unknown; choose from tiny, class, text"),
        ({"model.name": "unet", "model.size": "tiny", "model.unroll": 4}, "no scan over layers"),
        (
            {"model.name": "unet", "model.size": "tiny", "data.resolution": 18},
            "data.resolution=18 must be a multiple of 4 (downsampling 4 x latent factor 1)",
        ),
        (
            {"autoencoder.name": "kl", "data.resolution": 48},
            "data.resolution=48 must be a multiple of 32 (patch 4 x latent factor 8)",
        ),
    ],
)
def test_architectures_refuse_what_they_cannot_do(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny.config(**overrides)


def test_unknown_and_missing_fields_are_errors():
    values = tiny.values().to_dict()
    values["model"]["depht"] = 3
    with pytest.raises(ConfigError, match=r"unknown field model.depht"):
        config_lib.create(values)
    del values["model"]["depht"], values["optimizer"]["eps"]
    with pytest.raises(ConfigError, match=r"missing field optimizer.eps"):
        config_lib.create(values)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluation.reference": "coco"}, "reference=coco needs evaluation.path"),
        ({"evaluation.save": "jpg"}, "evaluation.save='jpg' is unknown"),
        ({"evaluation.metrics": ("fid50k",)}, "evaluation.metrics='fid50k' is unknown"),
        ({"evaluation.sizes": (64,)}, "evaluation.sizes must be two different"),
        ({"evaluation.sizes": (24, 24)}, "evaluation.sizes must be two different"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"sampling.seed": -1}, "sampling.seed must be between 0 and"),
        ({"sampling.size": "any"}, "sampling.size='any' is unknown"),
        ({"sampling.size_range": (64, 32)}, "sampling.size_range must be two sizes"),
        ({"conditioning.control": ("crop", "colour")}, "conditioning.control='colour' is unknown"),
        ({"data.semantics": "class", "data.classes": 7}, "data.classes=7, but shapes has 10 or 30"),
    ],
)
def test_bad_choices_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**overrides)


def test_stages_run_from_the_first_to_the_last_and_are_all_checked():
    third = tiny.values(**{"init.pretrain": tiny.values(**{"init.pretrain": tiny.values(steps=1)})})
    third.init.pretrain.steps = 2
    config = config_lib.create(third)
    assert [stage.steps for stage in config_lib.stages(config)] == [1, 2, 4]
    assert config_lib.create(json.loads(config.to_json())) == config
    third.init.pretrain.init.pretrain.model.name = "sit"
    with pytest.raises(ConfigError, match=r"^config: init.pretrain.init.pretrain.model.name='sit'"):
        config_lib.create(third)


def test_json_round_trip_is_the_same_config():
    config = tiny.config()
    assert config_lib.create(json.loads(config.to_json())) == config


def test_arguments_are_typed_and_unknown_ones_refused():
    parsed = base.arguments("alpha=4,flip=0,name=x", alpha=8.0, flip=True, name="", n=3)
    assert parsed.to_dict() == {"alpha": 4.0, "flip": False, "name": "x", "n": 3}
    with pytest.raises(ValueError, match="unknown config argument 'beta'; this config takes: n"):
        base.arguments("beta=1", n=3)
    with pytest.raises(ValueError, match="n='x' is not of type int"):
        base.arguments("n=x", n=3)


def test_differences_ignore_how_a_run_is_run_and_name_what_it_is():
    old = tiny.config()
    assert not config_lib.differences(old, tiny.config(steps=99, **{"sampling.guidance": 9.0}))
    found = config_lib.differences(old, tiny.config(**{"conditioning.alpha": 2.0}))
    assert found == ["conditioning.alpha: 8.0 -> 2.0"]
    two = tiny.values(**{"init.pretrain": tiny.values()})
    assert config_lib.differences(old, config_lib.create(two))
    one = config_lib.create(two)
    two.init.pretrain.sampling.guidance = 9.0
    assert not config_lib.differences(one, config_lib.create(two))
    two.init.pretrain.steps = 99
    found = config_lib.differences(one, config_lib.create(two))
    assert found == ["init.pretrain.steps: 4 -> 99"]
    cosine = {"optimizer.schedule": "cosine"}
    assert config_lib.differences(tiny.config(**cosine), tiny.config(steps=99, **cosine))
