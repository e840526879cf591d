"""Tests of mode prepare, and of training on its output with the paper's configs."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import stages
from condiff_jax.data.builders import BUILDERS, prepare
from condiff_jax.data.builders import prepare as driver
from condiff_jax.data.pipeline import batches, open_source
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import create_vocabulary
from configs import cc12m_512, imagenet1k_256, imagenet22k_256, pictures_64
from configs.recipes import CLASSES, all_stages
from tests import tiny
from tests.data.builders import archives

ROOT = Path(__file__).parents[3]
CONFIGS = {
    "imagenet1k": imagenet1k_256,
    "imagenet22k": imagenet22k_256,
    "cc12m": cc12m_512,
    "coco": pictures_64,
    "folder": pictures_64,
}


# Sources of each builder.
SOURCES = {
    "imagenet1k": archives.imagenet1k,
    "imagenet22k": archives.imagenet22k,
    "cc12m": archives.cc12m,
    "coco": functools.partial(archives.coco, splits=("train2014", "val2014"), zipped=True),
    "folder of classes": archives.classes,
    "folder with captions": archives.captions,
}


def configured(name, out, args="scale=tiny"):
    """Config of a builder with the smallest model, whose stages all use the folder `out`."""
    builder = name.split()[0]
    values = CONFIGS[builder].get_config(args)
    for stage in all_stages(values):
        stage.data.name, stage.data.path, stage.prepare.builder = "tfds", str(out), builder
    return values


def created(values, **fields):
    values.update_from_flattened_dict({name.replace("__", "."): v for name, v in fields.items()})
    return create_config(values)


# By default, all sources are tested for batches, and these for training.
TRAINED = ("coco",)


def prepared(name, tmp_path):
    """Prepare a source; returns its config."""
    source = SOURCES[name](tmp_path / "in")
    fields = {}
    args = "scale=tiny"
    if CONFIGS[name.split()[0]] is pictures_64:
        args = f"semantics={'class' if name.endswith('classes') else 'text'}"
        # With the same words, the run with captions resumes that of coco, whose compiled program
        # it reuses; so it needs more steps.
        steps = 3 if name.endswith("captions") else 2
        fields = {"steps": steps, "model__unroll": 1, "sampling__steps": 2, "sampling__n": 4}
    values = configured(name, tmp_path / "out", args)
    config = created(values, prepare__source=str(source), **fields)
    prepare.run(config)
    return config


@pytest.mark.parametrize("name", SOURCES)
def test_every_stage_makes_batches_of_prepared_data(name, tmp_path):
    for config in stages(prepared(name, tmp_path)):
        source = open_source(config)
        resolution = config.data.resolution
        vocabulary = create_vocabulary(config, source)
        encode_text = tiny.objective(config).encode_text if vocabulary.words else None
        batch = next(batches(config, source, encode_text))
        assert batch["image"].shape == (config.batch_size, resolution, resolution, 3)
        assert batch["image"].std() > 10 and not batch["broken"].any()
        if encode_text:
            assert batch["mask"].any(1).all()
        else:
            assert len(set(batch["label"].tolist())) > 1
            assert batch["label"].max() < len(vocabulary.classes)


@pytest.mark.parametrize(
    "name", [n if n in TRAINED else pytest.param(n, marks=pytest.mark.slow) for n in SOURCES]
)
def test_trains_on_prepared_data(name, tmp_path, trainer):
    assert trainer([prepared(name, tmp_path)]) == ""


def test_imagenet22k_has_the_classes_that_its_config_expects(tmp_path):
    source = archives.imagenet22k(tmp_path / "in", classes=30, n=1)
    config = created(configured("imagenet22k", tmp_path / "out"), prepare__source=str(source))
    prepare.run(config)
    assert len(create_vocabulary(config, open_source(config)).classes) == 30
    paper = created(configured("imagenet22k", tmp_path / "out", None))
    with pytest.raises(ConfigError, match="data.classes: is 21841, but the data has 30 classes"):
        create_vocabulary(paper, open_source(paper))


def test_a_path_that_is_not_read_is_an_error():
    config = created(imagenet1k_256.get_config("scale=tiny"), data__path="/prepared")
    with pytest.raises(ConfigError, match="data.path: is /prepared, but data.name=shapes"):
        open_source(config)


def test_recipes_name_their_builder():
    assert set(CLASSES) <= set(CONFIGS) == set(BUILDERS)
    for name, module in CONFIGS.items():
        config = module.get_config()
        builder = "folder" if module is pictures_64 else name
        assert (config.data.name, config.prepare.builder) == ("tfds", builder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prepare__builder": ""}, "prepare.builder: empty; mode prepare needs it"),
        ({"prepare__source": ""}, "prepare.source: empty"),
        ({"data__path": ""}, "data.path: empty"),
        ({"prepare__builder": "imagenet"}, "prepare.builder: unknown value 'imagenet'; choose"),
        ({"prepare__source": "/no/such"}, "prepare.source: /no/such does not exist"),
        ({"prepare__boxes": "/no/boxes"}, "prepare.boxes: /no/boxes cannot be read"),
        ({"data__path": "FILE"}, "data.path: .*holds other files"),
        ({"data__path": "FILE/file"}, "data.path: .*file"),
    ],
)
def test_bad_fields_are_named(fields, message, tmp_path):
    source = archives.cc12m(tmp_path / "in", tars=1, n=1)
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "file").touch()
    fields = {"prepare__source": str(source), "prepare__processes": 1, **fields}
    fields = {k: v.replace("FILE", str(folder)) if v is str(v) else v for k, v in fields.items()}
    with pytest.raises(ConfigError, match=message) as error:
        prepare.run(created(configured("cc12m", tmp_path / "out"), **fields))
    assert "\n" not in str(error.value)


def test_interrupts_exit_with_one_line(tmp_path, monkeypatch):
    source = archives.cc12m(tmp_path / "in", tars=1, n=1)
    fields = {"prepare__source": str(source), "prepare__processes": 1}
    config = created(configured("cc12m", tmp_path / "out"), **fields)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="goes on from there"):
        patch.setattr(driver, "run_job", interrupted)
        prepare.run(config)
    prepare.run(config)


def test_the_documented_command(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=1)
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "condiff_jax.main", "--mode=prepare",
        "--config=configs/imagenet1k_256.py",
        f"--config.prepare.source={source}", f"--config.data.path={out}",
    ]  # fmt: skip
    env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == (
        f"Prepared imagenet1k in {out}: 10 for train, 5 for validation, 10 classes."
    )
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["settings"]["builder"] == "imagenet1k"
