"""Sampling: sample i depends on (seed, i) alone; prompts, control and settings have effect."""

import dataclasses
import json
from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from condiff_jax.config.errors import ConfigError
from condiff_jax.diffusion.guidance import needed_branches
from condiff_jax.runs import state
from condiff_jax.runtime import flops, sharding
from condiff_jax.sampling import sample
from condiff_jax.sampling import sampler as sampler_lib
from condiff_jax.sampling.requests import (
    control_values,
    create_batch,
    guidance_scale,
    prompts_or_labels,
    read_prompts,
)
from condiff_jax.training import loop
from tests import tiny


@pytest.fixture(autouse=True, scope="module")
def few_layers():
    with tiny.few_layers():
        yield


@pytest.fixture(scope="module")
def trained():
    objective = tiny.objective(tiny.config(**{"sampling.eta": 1.0}))
    params = jax.jit(objective.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return objective, tree.unflatten(
        [a + 0.1 * rng.standard_normal(a.shape, np.float32) for a in leaves]
    )


def sample_images(objective, params, prompts, *, devices=8, batch_size=64, first=0, **fields):
    config = tiny.config(**{"sampling.batch_size": batch_size, "sampling.eta": 1.0, **fields})
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1), sharding.BATCH_AXES
    )
    sampler = sampler_lib.Sampler(objective, mesh, config.sampling)
    return sampler(params, create_batch(objective, prompts), first=first)


PROMPTS = ["red circle", "a blue square at the top left", "green ring"] * 3


def assert_same(a, b):
    """Assert equality up to one gray level: programs for other sizes round differently."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_samples_do_not_depend_on_batch_size_or_devices(trained):
    images = sample_images(*trained, PROMPTS)
    assert images.shape == (9, 16, 16, 3)
    assert_same(images, sample_images(*trained, PROMPTS, devices=1))
    assert_same(images, sample_images(*trained, PROMPTS, devices=1, batch_size=2))
    assert_same(images[4:6], sample_images(*trained, PROMPTS[4:6], devices=2, first=4))
    difference = np.abs(images[0].astype(int) - images[3].astype(int)).max()
    assert difference > 5  # same prompt, other noise


def test_seed_prompt_and_control_matter(trained):
    objective, params = trained
    images = sample_images(objective, params, PROMPTS[:2])
    other_seed = sample_images(objective, params, PROMPTS[:2], **{"sampling.seed": 1})
    assert np.abs(images - other_seed).max() > 5
    assert np.abs(images - sample_images(objective, params, ["red ring", "cross"])).max() > 1
    scaled = {"sampling.guidance": 1.25, "sampling.base_resolution": 8}  # Eq. 4: 1.5 at 16 pixels
    assert_same(images, sample_images(objective, params, PROMPTS[:2], **scaled))
    control = {name: value + 1 for name, value in control_values(objective.config, 2).items()}
    batch = create_batch(objective, PROMPTS[:2], control)
    sampler = sampler_lib.Sampler(objective, sharding.create_mesh(), objective.config.sampling)
    assert np.abs(images.astype(int) - sampler(params, batch).astype(int)).max() > 1


def test_other_guidance_scales_need_no_other_program(trained):
    objective, params = trained
    batch = create_batch(objective, PROMPTS[:2])
    fields = {"sampling.batch_size": 64, "sampling.eta": 1.0}
    sampler = sampler_lib.Sampler(objective, sharding.create_mesh(), tiny.config(**fields).sampling)
    images = []
    for guidance in (2.0, 4.0):
        other = sampler.at(tiny.config(**fields, **{"sampling.guidance": guidance}))
        images.append(other(params, batch))
    assert other.program._cache_size() == 1
    assert np.abs(images[0].astype(int) - images[1]).max() > 5
    expected = sample_images(objective, params, PROMPTS[:2], **{"sampling.guidance": 4.0})
    assert_same(images[1], expected)


SETTINGS = {  # each with a value other than the test's usual one
    "sampler": "ddpm", "steps": 7, "spacing": "linspace", "eta": 0.25, "guidance": 2.5,
    "control_guidance": 1.75, "base_resolution": 8, "clip": False,
}  # fmt: skip


@pytest.mark.parametrize("changed", [{}, *({name: value} for name, value in SETTINGS.items())])
def test_every_setting_reaches_guidance_and_sampler(trained, changed):
    """Trace with guidance and sampler replaced by functions that record their arguments."""
    objective, params = trained
    settings = {
        "sampler": "ddim", "steps": 5, "spacing": "trailing", "eta": 0.0, "guidance": 1.5,
        "control_guidance": 1.25, "base_resolution": 0, "clip": True,
    } | changed  # fmt: skip
    config = tiny.config(**{f"sampling.{name}": value for name, value in settings.items()})
    calls = []

    def sampler(name, denoise, schedule, x, cond, keys, **options):
        calls.append((name, denoise, options))
        assert schedule is objective.schedule
        return x

    samplers = {name: partial(sampler, name) for name in ("ddim", "ddpm")}
    with (
        mock.patch.object(sampler_lib, "SAMPLERS", samplers),
        mock.patch.object(sampler_lib, "dual_guidance", return_value="guided") as guidance,
    ):
        program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16)
        generate = partial(sampler_lib.generate, objective=objective, program=program)
        batch = create_batch(objective, PROMPTS[:2])
        jax.eval_shape(generate, params, {}, batch, np.arange(2, dtype=np.int32), scales)
    scale = 2.0 if "base_resolution" in changed else settings["guidance"]  # Eq. 4
    np.testing.assert_allclose(scales, [scale, settings["control_guidance"], 1.0])
    assert guidance.call_args.args[3] == needed_branches(scale, settings["control_guidance"])
    options = {name: settings[name] for name in ("steps", "spacing", "eta")}
    options["clip"] = objective.autoencoder.bound if settings["clip"] else None
    assert calls == [(settings["sampler"], "guided", options)] and objective.autoencoder.bound


def equations(jaxpr, loops=()):
    """Yield (name of the primitive, lengths of the enclosing scans, equation) of each equation."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        yield name, loops, eqn
        inside = (*loops, eqn.params["length"]) if name == "scan" else loops
        for inner in flops.inner_jaxprs(eqn.params):
            yield from equations(inner, inside)


@pytest.mark.parametrize("guidance, beta, branches", [(1.0, 1.0, 1), (1.5, 1.0, 2), (1.5, 1.25, 3)])
def test_the_sampler_is_one_loop_around_one_call_of_the_denoiser(trained, guidance, beta, branches):
    """One call for all branches of the guidance; the loop does not communicate with the host."""
    objective, params = trained
    scales = {"sampling.guidance": guidance, "sampling.control_guidance": beta}
    config = tiny.config(**scales, **{"sampling.steps": 7, "sampling.eta": 1.0})
    program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16)
    generate = partial(sampler_lib.generate, objective=objective, program=program)
    batch = create_batch(objective, PROMPTS[:3])
    args = params, {}, batch, np.arange(3, dtype=np.int32), scales
    closed = jax.make_jaxpr(generate)(*args)
    rows = list(equations(closed.jaxpr))
    depth = objective.model.depth
    assert [(loops, eqn.params["length"]) for name, loops, eqn in rows if name == "scan"] == [
        ((), 7), ((7,), depth),
    ]  # fmt: skip
    patch_embed = params["model"]["patch_embed"]["kernel"].shape
    calls = [
        (loops, eqn.outvars[0].aval.shape)
        for name, loops, eqn in rows
        if name == "dot_general" and eqn.invars[1].aval.shape == patch_embed
    ]
    assert calls == [((7,), (3 * branches, 16, patch_embed[1]))]
    names = {name for name, _, _ in rows}
    assert not names & {"while", "infeed", "outfeed", "device_put"}
    assert not closed.effects and not [name for name in names if "callback" in name]


def test_control_guidance_sampler_and_clip_change_images(trained):
    """With a closed form for the model, the settings that are passed on above have an effect."""

    class Linear(type(trained[0])):
        def denoise(self, params, **inputs):
            def eps(x, t, cond):
                factor = np.float32(2) - cond.drop_control - cond.drop_semantics
                return 0.5 * x * factor[:, None, None, None]

            return eps

    objective = Linear(**vars(trained[0]))
    batch = create_batch(objective, PROMPTS[:2])

    def sample_with(**fields):
        settings = tiny.config(**fields).sampling
        program, scales = sampler_lib.SamplingProgram.create(settings, 16)
        generate = partial(sampler_lib.generate, objective=objective, program=program)
        return np.asarray(generate(trained[1], {}, batch, np.arange(2), scales)).astype(int)

    default = sample_with()
    for field, value in (("control_guidance", 1.0), ("sampler", "ddpm"), ("clip", False)):
        assert np.abs(sample_with(**{f"sampling.{field}": value}) - default).max() > 5, field


def test_a_batch_has_the_sizes_of_its_sample_indices(trained):
    fields = {"sampling.size": "tied", "sampling.size_range": (20, 40)}
    objective = dataclasses.replace(trained[0], config=tiny.config(**fields))
    batch = create_batch(objective, PROMPTS[:2], first=3)
    np.testing.assert_array_equal(batch["control"]["height"], sizes(5, **fields)[0][3:])


def test_control_defaults_to_an_uncropped_image_of_the_training_resolution():
    values = control_values(tiny.config(**{"sampling.control.width": 48.0}), 2)
    assert {k: v[0] for k, v in values.items()} == {
        "crop_top": 0, "crop_left": 0, "crop_height": 1, "crop_width": 1,
        "flip": 0, "aspect": 1, "height": 16, "width": 48,
    }  # fmt: skip


def sizes(n=6, seen=None, first=0, **fields):
    values = control_values(tiny.config(**fields), n, first=first, seen=seen)
    assert all(a.shape == (n,) and a.dtype == np.float32 for a in values.values())
    return values["height"], values["width"], values["aspect"]


def test_sizes_are_drawn_as_configured_and_depend_on_seed_and_index_alone():
    fields = {"sampling.size": "untied", "sampling.size_range": (20, 40)}
    height, width, aspect = sizes(500, **fields)
    for a in (height, width):
        assert 20 <= a.min() < 21 and 39 < a.max() <= 40 and abs(a.mean() - 30) < 1.5
    assert abs(np.corrcoef(height, width)[0, 1]) < 0.15
    np.testing.assert_allclose(aspect, width / height)
    np.testing.assert_array_equal(sizes(2, first=3, **fields)[0], height[3:5])
    assert (sizes(**fields, **{"sampling.seed": 1})[0] != height[:6]).all()
    height, width, aspect = sizes(**fields | {"sampling.size": "tied"})
    np.testing.assert_array_equal(height, width)
    assert len(set(height)) == 6 and (aspect == 1).all()


def test_sizes_of_the_training_data_come_in_pairs():
    seen = np.zeros((3, 8), np.float32)
    seen[:, -2:] = [[10, 20], [30, 60], [50, 100]]
    height, width, aspect = sizes(60, seen, **{"sampling.size": "train"})
    assert set(height) == {10, 30, 50}
    np.testing.assert_array_equal(width, 2 * height)
    assert (aspect == 2).all()
    with pytest.raises(ConfigError, match="sampling.size: train needs"):
        sizes(**{"sampling.size": "train"})
    height, _, _ = sizes(**{"sampling.size": "train", "conditioning.control": ("crop",)})
    assert (height == 16).all()  # a model without size control


def test_guidance_scale_grows_with_the_resolution():
    settings = {"sampling.guidance": 1.5}
    assert guidance_scale(tiny.config(**settings).sampling, 512) == 1.5
    settings["sampling.base_resolution"] = 256
    for resolution, scale in ((256, 1.5), (512, 2.0), (1024, 3.0)):
        assert guidance_scale(tiny.config(**settings).sampling, resolution) == scale


def test_mode_sample_writes_images_captions_and_a_grid(tmp_path, capsys):
    loop.run(tiny.config(steps=2, **{"sampling.size": "train"}), str(tmp_path))
    assert np.load(tmp_path / "control.npy").shape == (16, 8)  # tiny.random_start: of 1024
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na green ring\n")
    fields = {"sampling.prompt_file": str(prompts), "sampling.n": 3, "sampling.seed": 5}
    with mock.patch.object(state, "to_sample", wraps=state.to_sample) as to_sample:
        folder = sample.run(tiny.config(**fields, **{"sampling.ema": False}), str(tmp_path))
    assert [call.args[1] for call in to_sample.call_args_list] == [False]
    assert sorted(p.name for p in folder.iterdir()) == [
        "000000.png", "000001.png", "000002.png", "captions.txt", "grid.png",
    ]  # fmt: skip
    assert (folder / "captions.txt").read_text().splitlines() == [
        "a red circle", "a green ring", "a red circle",
    ]  # fmt: skip
    assert Image.open(folder / "000000.png").size == (16, 16)
    assert "3 images of step 2" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


@pytest.mark.parametrize(
    ("content", "error"),
    [(None, "does not exist"), ("\n \n", "is empty"), (b"\xff\xfe", "not a UTF-8 text")],
)
def test_bad_prompt_files(tmp_path, content, error):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=error):
        read_prompts(str(path))


def test_no_prompts_unknown_class_and_missing_run_are_errors(tmp_path, trained):
    with pytest.raises(ConfigError, match="sampling.prompts: empty"):
        prompts_or_labels(tiny.config(), trained[0])
    config = tiny.config(**{"data.semantics": "class", "sampling.labels": (10,)})
    with pytest.raises(ConfigError, match="sampling.labels: must be between 0 and 9, got 10"):
        prompts_or_labels(config, tiny.objective(config))
    with pytest.raises(ConfigError, match="no run here"):
        sample.run(tiny.config(), str(tmp_path / "nothing"))
