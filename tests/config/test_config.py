"""Validation: bad values are errors that name the field and the fix; good ones round-trip."""

import dataclasses
import json
import re
import typing

import pytest

from condiff_jax.conditioning.dropout import DROP_MODES
from condiff_jax.config import schema
from condiff_jax.config.build import from_text, with_fields
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import differences, stages
from condiff_jax.data.builders import BUILDERS
from condiff_jax.data.pipeline import SOURCES
from condiff_jax.diffusion.prediction import PREDICTIONS
from condiff_jax.diffusion.sampler import SAMPLERS, SPACINGS
from condiff_jax.diffusion.schedule import SCHEDULES
from condiff_jax.evaluation.evaluate import MEASURES
from condiff_jax.evaluation.protocols import PROTOCOLS
from condiff_jax.models import MODELS, attention, kl
from condiff_jax.models.mmdit import STREAMS
from condiff_jax.models.transformer import REMAT
from condiff_jax.objectives.validate import create_config
from configs import base
from tests import tiny


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model.name", "sit", "choose from unet, unet2d, .*, mmdit, ours"),
        ("model.size", "XXL/2", "model.size"),
        ("model.size", "XL", "NAME/PATCH"),
        ("data.resolution", 18, "must be a multiple of 4 .*, got 18"),
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
        ("steps", 0, "^steps: must be at least 1, got 0$"),
        ("steps", "many", "must be of type int, got 'many'"),
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
        create_config(values)
    assert field.split(".")[-1] in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.name": "pixart", "model.streams": "full"}, "model.streams: must be auto"),
        (
            {"model.name": "dit_ln"},
            "data.semantics: model.name=dit_ln is for classes only; set it to class",
        ),
        ({"model.name": "unet"}, "model.size: must be one of tiny, class, text; got 'tiny/4'"),
        ({"model.name": "unet", "model.size": "tiny", "model.unroll": 4}, "no scan over layers"),
        (
            {"model.name": "unet", "model.size": "tiny", "data.resolution": 18},
            "data.resolution: must be a multiple of 4 (downsampling 4 x latent factor 1), got 18",
        ),
        (
            {"autoencoder.name": "kl", "data.resolution": 48},
            "data.resolution: must be a multiple of 32 (patch 4 x latent factor 8), got 48",
        ),
    ],
)
def test_architectures_refuse_what_they_cannot_do(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        tiny.config(**overrides)


def test_unknown_fields_are_errors_and_missing_ones_take_their_default():
    values = tiny.values().to_dict()
    values["model"]["depht"] = 3
    with pytest.raises(ConfigError, match=r"^model.depht: unknown field; choose from name, size, "):
        create_config(values)
    del values["model"]["depht"], values["optimizer"]["eps"], values["log"]
    config = create_config(values)
    assert config.optimizer.eps == 1e-8
    assert config.log == schema.Log()
    with pytest.raises(ConfigError, match="^data: must have fields, got 'shapes'"):
        create_config(values | {"data": "shapes"})


def test_a_renamed_field_is_read_by_its_old_name():
    values = tiny.values(**{"init.pretrain": tiny.values()}).to_dict()
    for stage in (values, values["init"]["pretrain"]):
        del stage["conditioning"]["drop_mode"]
        stage["conditioning"]["dropping"] = "independent"
    config = create_config(values)
    assert [stage.conditioning.drop_mode for stage in stages(config)] == ["independent"] * 2


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluation.reference": "coco"}, "evaluation.path: evaluation.reference=coco needs"),
        ({"evaluation.save": "jpg"}, "evaluation.save: unknown value 'jpg'; choose from png, npz"),
        (
            {"evaluation.metrics": ("fid50k",)},
            "evaluation.metrics: unknown value 'fid50k'; choose from prompt_",
        ),
        ({"evaluation.sizes": (64,)}, "evaluation.sizes: must be at least two different"),
        ({"evaluation.sizes": (24, 24)}, "evaluation.sizes: must be at least two different"),
        ({"seed": -1}, "^seed: must be between 0 and 4294967295, got -1"),
        ({"sampling.seed": -1}, "sampling.seed: must be between 0 and"),
        ({"sampling.size": "any"}, "sampling.size: unknown value 'any'"),
        ({"sampling.size_range": (64, 32)}, "sampling.size_range: must be two sizes"),
        (
            {"conditioning.control": ("crop", "colour")},
            "conditioning.control: unknown value 'colour'; choose from crop, flip",
        ),
        (
            {"data.semantics": "class", "data.classes": 7},
            "data.classes: must be 10 or 30 for shapes, got 7",
        ),
    ],
)
def test_bad_choices_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny.config(**overrides)


def test_stages_run_from_the_first_to_the_last_and_are_all_checked():
    third = tiny.values(**{"init.pretrain": tiny.values(**{"init.pretrain": tiny.values(steps=1)})})
    third.init.pretrain.steps = 2
    config = create_config(third)
    assert [stage.steps for stage in stages(config)] == [1, 2, 4]
    assert create_config(json.loads(config.to_json())) == config
    third.init.pretrain.init.pretrain.model.name = "sit"
    with pytest.raises(
        ConfigError, match=r"^init.pretrain.init.pretrain.model.name: unknown value 'sit'"
    ):
        create_config(third)


def test_json_round_trip_is_the_same_config():
    config = tiny.config()
    assert create_config(json.loads(config.to_json())) == config


def test_arguments_are_typed_and_unknown_ones_refused():
    parsed = base.arguments("alpha=4,flip=0,name=x", alpha=8.0, flip=True, name="", n=3)
    assert parsed.to_dict() == {"alpha": 4.0, "flip": False, "name": "x", "n": 3}
    with pytest.raises(ValueError, match="unknown config argument 'beta'; this config takes: n"):
        base.arguments("beta=1", n=3)
    with pytest.raises(ValueError, match="n='x' is not of type int"):
        base.arguments("n=x", n=3)


def test_differences_ignore_how_a_run_is_run_and_name_what_it_is():
    old = tiny.config()
    assert not differences(old, tiny.config(steps=99, **{"sampling.guidance": 9.0}))
    found = differences(old, tiny.config(**{"conditioning.alpha": 2.0}))
    assert found == ["conditioning.alpha: 8.0 -> 2.0"]
    two = tiny.values(**{"init.pretrain": tiny.values()})
    assert differences(old, create_config(two))
    one = create_config(two)
    two.init.pretrain.sampling.guidance = 9.0
    assert not differences(one, create_config(two))
    two.init.pretrain.steps = 99
    found = differences(one, create_config(two))
    assert found == ["init.pretrain.steps: 4 -> 99"]
    cosine = {"optimizer.schedule": "cosine"}
    assert differences(tiny.config(**cosine), tiny.config(steps=99, **cosine))


def test_other_fields_are_checked_like_all():
    config = create_config(tiny.values(**{"init.pretrain": tiny.values()}))
    changed = with_fields(config, {"sampling.steps": 2, "init.pretrain.seed": 5, "data.crop": 0.5})
    assert (changed.sampling.steps, changed.init.pretrain.seed) == (2, 5)
    assert changed.data.crop == (0.5,)
    assert with_fields(changed, {"init.pretrain": config}).init.pretrain == config
    assert with_fields(config, {}) == config
    for field, value, reason in [
        ("sampling.steps", 0, "must be at least 1, got 0"),
        ("sampling.step", 1, "unknown field; choose from sampler, steps"),
        ("init.pretrain.init.pretrain.seed", 1, "this config has no init.pretrain.init.pretrain"),
        ("data.name.other.field", 1, "this config has no data.name.other"),
        ("samplings.steps", 1, "this config has no samplings"),
    ]:
        with pytest.raises(ConfigError, match=f"^{field}: {reason}"):
            with_fields(config, {field: value})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("sampling.guidance", "2", 2.0),
        ("sampling.steps", "25", 25),
        ("sampling.clip", "false", False),
        ("sampling.size", "train", "train"),
        ("data.path", "(1)", "(1)"),
        ("conditioning.control", "('crop', 'size')", ("crop", "size")),
        ("profile", "3,5", (3, 5)),
        ("init.pretrain.init.pretrain.steps", "7", 7),
    ],
)
def test_text_is_read_as_the_type_of_its_field(field, text, value):
    found = from_text(field, text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("sampling.steps", "many", "must be of type int, got 'many'"),
        ("sampling.steps", "2.5", "must be of type int, got 2.5"),
        ("sampling.clip", "1", "must be of type bool, got 1"),
        ("sampling.size", "any", "unknown value 'any'"),
        ("sampling", "1", "no such field"),
        ("init.pretrain", "1", "no such field"),
        ("model.name.size", "1", "no such field"),
        ("samplin.steps", "1", "no such field"),
    ],
)
def test_text_of_another_type_is_an_error(field, text, reason):
    with pytest.raises(ConfigError, match=f"^{field}: {reason}"):
        from_text(field, text)


REGISTRIES = {
    "model.name": MODELS,
    "model.streams": ("auto", *STREAMS),
    "model.attention": attention.BACKENDS,
    "model.remat": REMAT,
    "data.name": SOURCES,
    "prepare.builder": ("", *BUILDERS),
    "conditioning.drop_mode": DROP_MODES,
    "diffusion.schedule": SCHEDULES,
    "diffusion.prediction": PREDICTIONS,
    "autoencoder.size": kl.SIZES,
    "sampling.sampler": SAMPLERS,
    "sampling.spacing": SPACINGS,
    "evaluation.metrics": set().union(*(names for names, _ in MEASURES)),
    "evaluation.protocol": ("", *PROTOCOLS),
}
# Choices of which the code that uses them has no table.
BY_NAME = {
    "objective", "model.position", "model.dtype", "data.semantics", "optimizer.name",
    "optimizer.schedule", "autoencoder.name", "text_encoder.name", "sampling.size",
    "evaluation.reference", "evaluation.resize", "evaluation.save",
}  # fmt: skip


def literals(section=schema.Config, prefix=""):
    """Choices of each field that has some, by dotted name."""
    found = {}
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            found |= literals(hint, f"{prefix}{name}.")
        hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        if typing.get_origin(hint) is typing.Literal:
            found[prefix + name] = typing.get_args(hint)
    return found


def test_choices_are_those_of_the_registries():
    choices = literals()
    assert choices.keys() == REGISTRIES.keys() | BY_NAME
    for field, registry in REGISTRIES.items():
        assert set(choices[field]) == set(registry), field


def test_configs_start_from_the_defaults_of_the_schema():
    assert create_config(base.get_config()) == schema.Config()
    assert create_config({}) == schema.Config()
