"""The entries of docs/extending.md, run as they stand there: they train, sample and export."""

import re
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from condiff_jax.conditioning import PADDINGS, SCALARS, WEIGHTINGS, Cond
from condiff_jax.config.build import with_fields
from condiff_jax.config.errors import ConfigError
from condiff_jax.data.pipeline import batches, create_source, first_controls
from condiff_jax.pytorch import exporting, models
from condiff_jax.sampling import sample
from condiff_jax.sampling.requests import create_batch
from condiff_jax.training import loop
from tests import tiny

DOC = Path(__file__).parents[2] / "docs" / "extending.md"
OWN = {
    "conditioning.control": ("crop", "lightness"),
    "conditioning.weighting": "root",
    "model.name": "dit_ln",
    "data.semantics": "class",
}


@pytest.fixture(scope="module", autouse=True)
def entries():
    blocks = re.findall("```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) == 3
    with (
        mock.patch.dict(SCALARS),
        mock.patch.dict(WEIGHTINGS),
        mock.patch.dict(PADDINGS),
        tiny.few_layers(),
    ):
        for block in blocks:
            exec(block, {})
        yield


def test_all_three_train_and_sample_and_the_padding_is_refused_at_the_start_of_an_export(tmp_path):
    own = {**OWN, "data.semantics": "text", "model.name": "ours", "conditioning.padding": "first"}
    config = tiny.config(steps=1, **own, **{"sampling.n": 2, "sampling.prompts": "a ring"})
    source, objective = create_source(config), tiny.objective(config)
    batch = next(batches(config, source, objective.encode_text))
    lightness = batch["image"].mean((1, 2, 3)) / 255
    np.testing.assert_allclose(batch["control"]["lightness"], lightness, rtol=1e-6)
    features = FEATURES | {"control": {name: np.zeros(1, np.float32) for name in SCALARS}}
    text = objective.condition({}, features, None).semantics
    np.testing.assert_array_equal(text.tokens[0, 2:], np.broadcast_to(text.tokens[0, 0], (6, 16)))
    assert loop.run(config, str(tmp_path))
    assert (sample.run(config, str(tmp_path)) / "000001.png").exists()
    with pytest.raises(
        ConfigError, match="^conditioning.padding: first is missing in PyTorch; add"
    ):
        exporting.run(config, str(tmp_path))


def test_they_are_exported_as_they_are_trained(tmp_path):
    config = tiny.config(**OWN)
    params = tiny.finished(config, tmp_path)
    network = models.load(exporting.run(config, str(tmp_path)) / "network")
    objective, rng = tiny.objective(config), np.random.default_rng(0)
    x, t = rng.normal(size=(2, 16, 16, 3)).astype(np.float32), np.array([3, 700])
    own = objective.example(2)["control"] | {"lightness": np.full(2, 0.8, np.float32)}
    own["crop_height"] = own["crop_width"] = np.ones(2, np.float32)
    cond = Cond.of(jnp.array([1, 4]), objective.control.control(own))
    expected = jax.jit(objective.denoise(params))(x, t, cond)
    with torch.no_grad():
        eps = network["model"](
            torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t), torch.tensor([1, 4]),
            network.control({"lightness": 0.8}, 2),
        )  # fmt: skip
    np.testing.assert_allclose(eps.permute(0, 2, 3, 1), expected, rtol=1e-3, atol=1e-4)
    assert network.settings["control"]["lightness"] == 0.5


FEATURES = {
    "label": np.zeros(1, np.int32),
    "tokens": np.random.default_rng(0).normal(size=(1, 8, 16)),
    "pooled": np.zeros((1, 16)),
    "mask": np.arange(8)[None] < 2,
}


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("conditioning.control", ("crop", "hue"), "crop, flip, aspect, size, color, lightness"),
        ("conditioning.weighting", "square", "cosine, .*, root"),
        ("conditioning.padding", "last", "zero, .*, first"),
    ],
)
def test_unknown_entries_are_refused_with_all_choices(field, value, choices):
    with pytest.raises(ConfigError, match=f"^{field}: unknown value .*; choose from {choices}$"):
        tiny.config(**{field: value})


def test_colors_are_conditioned_on_where_they_are_jittered():
    color = {"conditioning.control": ("flip", "color"), "data.color": 0.4}
    with pytest.raises(ConfigError, match="^data.color: 0, but conditioning.control has color"):
        tiny.config(**{"conditioning.control": ("flip", "color")})
    config = tiny.config(**color, **{"model.name": "dit_ln", "data.semantics": "class"})
    objective = tiny.objective(config)
    assert objective.control.low == ("brightness", "contrast", "saturation")
    batch = next(batches(config, create_source(config)))
    assert 0.6 <= batch["control"]["contrast"].min() < batch["control"]["contrast"].max() <= 1.4
    controls = first_controls(config, create_source(config), n=9)
    assert controls.shape == (9, len(SCALARS))
    own = {"sampling.control.contrast": 0.7, "sampling.control.saturation": 1.3}
    asked = create_batch(tiny.objective(with_fields(config, own)), [1, 2])
    low = objective.control.control(asked["control"]).low
    np.testing.assert_allclose(low, [[1000, 700, 1300]] * 2)
