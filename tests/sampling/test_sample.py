"""Sampling: sample i depends on (seed, i) alone; prompts and control are what was asked for."""

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
    asked_for,
    control_values,
    guidance_scale,
    read_prompts,
    requests,
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


def pictures(objective, params, prompts, *, devices=8, batch_size=64, first=0, **fields):
    config = tiny.config(**{"sampling.batch_size": batch_size, "sampling.eta": 1.0, **fields})
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1), sharding.BATCH_AXES
    )
    sampler = sampler_lib.Sampler(objective, mesh, config.sampling)
    return sampler(params, requests(objective, prompts), first=first)


PROMPTS = ["red circle", "a blue square at the top left", "green ring"] * 3


def assert_same(a, b):
    """Equal up to one grey level: programs for other sizes round differently."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_samples_do_not_depend_on_batch_size_or_devices(trained):
    whole = pictures(*trained, PROMPTS)
    assert whole.shape == (9, 16, 16, 3)
    assert_same(whole, pictures(*trained, PROMPTS, devices=1))
    assert_same(whole, pictures(*trained, PROMPTS, devices=1, batch_size=2))
    assert_same(whole[4:6], pictures(*trained, PROMPTS[4:6], devices=2, first=4))
    different = np.abs(whole[0].astype(int) - whole[3].astype(int)).max()
    assert different > 5  # same prompt, other noise


def test_seed_prompt_and_control_matter(trained):
    objective, params = trained
    whole = pictures(objective, params, PROMPTS[:2])
    assert (
        np.abs(whole - pictures(objective, params, PROMPTS[:2], **{"sampling.seed": 1})).max() > 5
    )
    assert np.abs(whole - pictures(objective, params, ["red ring", "cross"])).max() > 1
    doubled = {"sampling.guidance": 1.25, "sampling.base_resolution": 8}  # Eq. 4: 1.5 at 16 pixels
    assert_same(whole, pictures(objective, params, PROMPTS[:2], **doubled))
    request = requests(
        objective, PROMPTS[:2], {k: v + 1 for k, v in control_values(objective.config, 2).items()}
    )
    sampler = sampler_lib.Sampler(objective, sharding.create_mesh(), objective.config.sampling)
    assert np.abs(whole.astype(int) - sampler(params, request).astype(int)).max() > 1


def test_other_guidance_scales_need_no_other_program(trained):
    objective, params = trained
    request = requests(objective, PROMPTS[:2])
    fields = {"sampling.batch_size": 64, "sampling.eta": 1.0}
    sampler = sampler_lib.Sampler(objective, sharding.create_mesh(), tiny.config(**fields).sampling)
    made = []
    for guidance in (2.0, 4.0):
        other = sampler.at(tiny.config(**fields, **{"sampling.guidance": guidance}))
        made.append(other(params, request))
    assert other.program._cache_size() == 1
    assert np.abs(made[0].astype(int) - made[1]).max() > 5
    assert_same(made[1], pictures(objective, params, PROMPTS[:2], **{"sampling.guidance": 4.0}))


SETTINGS = {  # each with a value other than the test's usual one
    "sampler": "ddpm", "steps": 7, "spacing": "linspace", "eta": 0.25, "guidance": 2.5,
    "control_guidance": 1.75, "base_resolution": 8, "clip": False,
}  # fmt: skip


@pytest.mark.parametrize("changed", [{}, *({name: value} for name, value in SETTINGS.items())])
def test_every_setting_reaches_guidance_and_sampler(trained, changed):
    """Traced alone, with both of them replaced by what notes its arguments."""
    objective, params = trained
    settings = {
        "sampler": "ddim", "steps": 5, "spacing": "trailing", "eta": 0.0, "guidance": 1.5,
        "control_guidance": 1.25, "base_resolution": 0, "clip": True,
    } | changed  # fmt: skip
    config = tiny.config(**{f"sampling.{name}": value for name, value in settings.items()})
    calls = []

    def sampler(name, denoise, schedule, x, cond, keys, **given):
        calls.append((name, denoise, given))
        assert schedule is objective.schedule
        return x

    samplers = {name: partial(sampler, name) for name in ("ddim", "ddpm")}
    with (
        mock.patch.object(sampler_lib, "SAMPLERS", samplers),
        mock.patch.object(sampler_lib, "dual_guidance", return_value="guided") as guidance,
    ):
        program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16)
        generate = partial(sampler_lib.generate, objective=objective, program=program)
        request = requests(objective, PROMPTS[:2])
        jax.eval_shape(generate, params, {}, request, np.arange(2, dtype=np.int32), scales)
    scale = 2.0 if "base_resolution" in changed else settings["guidance"]  # Eq. 4
    np.testing.assert_allclose(scales, [scale, settings["control_guidance"], 1.0])
    assert guidance.call_args.args[3] == needed_branches(scale, settings["control_guidance"])
    given = {name: settings[name] for name in ("steps", "spacing", "eta")}
    given["clip"] = objective.autoencoder.bound if settings["clip"] else None
    assert calls == [(settings["sampler"], "guided", given)] and objective.autoencoder.bound


def equations(jaxpr, loops=()):
    """(primitive's name, lengths of the scans around it, the equation) of every equation."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        yield name, loops, eqn
        inside = (*loops, eqn.params["length"]) if name == "scan" else loops
        for inner in flops.inner_jaxprs(eqn.params):
            yield from equations(inner, inside)


@pytest.mark.parametrize("guidance, beta, branches", [(1.0, 1.0, 1), (1.5, 1.0, 2), (1.5, 1.25, 3)])
def test_the_sampler_is_one_loop_around_one_call_of_the_denoiser(trained, guidance, beta, branches):
    """Of all branches of the guidance together, and nothing in it goes to the host."""
    objective, params = trained
    scales = {"sampling.guidance": guidance, "sampling.control_guidance": beta}
    config = tiny.config(**scales, **{"sampling.steps": 7, "sampling.eta": 1.0})
    program, scales = sampler_lib.SamplingProgram.create(config.sampling, 16)
    generate = partial(sampler_lib.generate, objective=objective, program=program)
    request = requests(objective, PROMPTS[:3])
    args = params, {}, request, np.arange(3, dtype=np.int32), scales
    whole = jax.make_jaxpr(generate)(*args)
    found = list(equations(whole.jaxpr))
    depth = objective.model.depth
    assert [(loops, eqn.params["length"]) for name, loops, eqn in found if name == "scan"] == [
        ((), 7), ((7,), depth),
    ]  # fmt: skip
    first = params["model"]["patch_embed"]["kernel"].shape
    calls = [
        (loops, eqn.outvars[0].aval.shape)
        for name, loops, eqn in found
        if name == "dot_general" and eqn.invars[1].aval.shape == first
    ]
    assert calls == [((7,), (3 * branches, 16, first[1]))]
    names = {name for name, _, _ in found}
    assert not names & {"while", "infeed", "outfeed", "device_put"}
    assert not whole.effects and not [name for name in names if "callback" in name]


def test_control_guidance_sampler_and_clip_change_pictures(trained):
    """The same with a closed form for the model: what is noted above is also heard."""

    class Linear(type(trained[0])):
        def denoise(self, params, **inputs):
            def eps(x, t, cond):
                heard = np.float32(2) - cond.drop_control - cond.drop_semantics
                return 0.5 * x * heard[:, None, None, None]

            return eps

    objective = Linear(**vars(trained[0]))
    request = requests(objective, PROMPTS[:2])

    def made(**fields):
        settings = tiny.config(**fields).sampling
        program, scales = sampler_lib.SamplingProgram.create(settings, 16)
        generate = partial(sampler_lib.generate, objective=objective, program=program)
        return np.asarray(generate(trained[1], {}, request, np.arange(2), scales)).astype(int)

    usual = made()
    for field, value in (("control_guidance", 1.0), ("sampler", "ddpm"), ("clip", False)):
        assert np.abs(made(**{f"sampling.{field}": value}) - usual).max() > 5, field


def test_requests_ask_for_the_sizes_of_their_numbers(trained):
    fields = {"sampling.size": "tied", "sampling.size_range": (20, 40)}
    objective = dataclasses.replace(trained[0], config=tiny.config(**fields))
    request = requests(objective, PROMPTS[:2], first=3)
    np.testing.assert_array_equal(request["control"]["height"], sizes(5, **fields)[0][3:])


def test_control_defaults_to_an_uncropped_picture_of_the_training_resolution():
    values = control_values(tiny.config(**{"sampling.control.width": 48.0}), 2)
    assert {k: v[0] for k, v in values.items()} == {
        "crop_top": 0, "crop_left": 0, "crop_height": 1, "crop_width": 1,
        "flip": 0, "aspect": 1, "height": 16, "width": 48,
    }  # fmt: skip


def sizes(n=6, seen=None, first=0, **fields):
    values = control_values(tiny.config(**fields), n, first=first, seen=seen)
    assert all(a.shape == (n,) and a.dtype == np.float32 for a in values.values())
    return values["height"], values["width"], values["aspect"]


def test_sizes_are_drawn_as_asked_and_depend_on_seed_and_index_alone():
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
    assert (height == 16).all()  # nobody hears it


def test_guidance_grows_with_the_resolution_it_is_not_for():
    settings = {"sampling.guidance": 1.5}
    assert guidance_scale(tiny.config(**settings).sampling, 512) == 1.5
    settings["sampling.base_resolution"] = 256
    for resolution, scale in ((256, 1.5), (512, 2.0), (1024, 3.0)):
        assert guidance_scale(tiny.config(**settings).sampling, resolution) == scale


def test_mode_sample_writes_what_was_asked(tmp_path, capsys):
    loop.run(tiny.config(steps=2, **{"sampling.size": "train"}), str(tmp_path))
    assert np.load(tmp_path / "control.npy").shape == (16, 8)  # tiny.random_start: of 1024
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na green ring\n")
    fields = {"sampling.prompt_file": str(prompts), "sampling.n": 3, "sampling.seed": 5}
    with mock.patch.object(state, "to_sample", wraps=state.to_sample) as chosen:
        folder = sample.run(tiny.config(**fields, **{"sampling.ema": False}), str(tmp_path))
    assert [call.args[1] for call in chosen.call_args_list] == [False]
    assert sorted(p.name for p in folder.iterdir()) == [
        "000000.png", "000001.png", "000002.png", "captions.txt", "grid.png",
    ]  # fmt: skip
    assert (folder / "captions.txt").read_text().splitlines() == [
        "a red circle", "a green ring", "a red circle",
    ]  # fmt: skip
    assert Image.open(folder / "000000.png").size == (16, 16)
    assert "3 pictures of step 2" in capsys.readouterr().out
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
        asked_for(tiny.config(), trained[0])
    config = tiny.config(**{"data.semantics": "class", "sampling.labels": (10,)})
    with pytest.raises(ConfigError, match="sampling.labels: must be between 0 and 9, got 10"):
        asked_for(config, tiny.objective(config))
    with pytest.raises(ConfigError, match="no run here"):
        sample.run(tiny.config(), str(tmp_path / "nothing"))
