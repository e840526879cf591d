"""Mode `import`: runs imported from published layouts predict what the originals do."""

import contextlib
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.numpy import save_file

from benchmarks import parity
from condiff_jax.conditioning.cond import Cond
from condiff_jax.config.errors import ConfigError
from condiff_jax.diffusion.sampler import ddim, initial_noise
from condiff_jax.models import unet
from condiff_jax.objectives import diffusion
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch
from condiff_jax.pytorch import exporting, importing
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding
from condiff_jax.sampling import sample
from condiff_jax.training import loop
from tests import tiny

ROOT = Path(__file__).parents[2]

# architecture: the layouts it is published in
LAYOUTS = {
    "dit_ln": ("facebookresearch/DiT", "DiTTransformer2DModel"),
    "mdtv2": ("sail-sg/MDT",),
    "pixart": ("PixArtTransformer2DModel",),
    "mmdit": ("SD3Transformer2DModel",),
    "unet": ("UNet2DConditionModel",),
}
LINEAR = {
    "diffusion.schedule": "linear",
    "diffusion.beta_start": 1e-4,
    "diffusion.beta_end": 0.02,
}
PAIRS = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


def config(name, **overrides):
    """The configuration for published weights of an architecture."""
    text = name in ("pixart", "mmdit", "unet")
    fields = {
        "model.name": name,
        "model.size": "tiny" if name == "unet" else "tiny/4",
        "model.position": "extrapolate",
        "model.qk_norm": False,
        "model.streams": "full" if name == "mmdit" else "auto",
        "data.semantics": "text" if text else "class",
        "conditioning.control": (),
    }
    return tiny.config(**(fields | overrides))


@contextlib.contextmanager
def small():
    """Patch model sizes to few arrays, and training to start without compiling."""
    size = unet.Size((16,), (True,), 16, head_size=8, resnets=1)
    with mock.patch.dict(unet.SIZES, {"tiny": size}), tiny.few_layers():
        yield


def weights(objective, layout, *, sigma=False):
    """(random parameters, the same in a published layout); sigma: add outputs of variances."""
    params = parity.random_like(objective.shapes["model"])
    state = key_maps.to_published(to_torch(params), importing.LAYOUTS[layout].rules(objective))
    if sigma:
        channels = objective.latent_shape[-1]
        for name in [n for n in state if n.startswith(("final_layer.linear", "proj_out"))]:
            if name.startswith("proj_out_1"):
                continue
            array = state[name].reshape(-1, channels, *state[name].shape[1:])
            both = np.concatenate([array, array + 1], 1)
            state[name] = both.reshape(-1, *state[name].shape[1:])
    return params, state


def imported(objective, source, folder):
    """Import into a work directory and return its parameters."""
    importing.run(objective.config, str(folder))
    mesh = sharding.create_mesh(1)
    checkpoints = Checkpoints(Workdir(str(folder)).checkpoints, objective.config)
    step, params = checkpoints.restore_params(objective, mesh)
    assert step == 0
    return params["model"]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A cached function: (objective, parameters, folder, imported parameters, printed text)."""
    cache = {}

    def get(name, layout):
        if layout not in cache:
            folder = tmp_path_factory.mktemp("import")
            printed = io.StringIO()
            source = folder / "source" / ("unet" if name == "unet" else "transformer")
            source.mkdir(parents=True)  # as in a diffusers pipeline
            with small(), contextlib.redirect_stdout(printed):
                objective = tiny.objective(config(name, **{"convert.source": str(source.parent)}))
                params, state = weights(objective, layout, sigma=name in ("dit_ln", "pixart"))
                file = source / "diffusion_pytorch_model.safetensors"
                save_file({key: np.ascontiguousarray(a) for key, a in state.items()}, file)
                back = imported(objective, source.parent, folder / "run")
            run = Workdir(str(folder / "run"))
            cache[layout] = objective, params, run, back, printed.getvalue()
        return cache[layout]

    return get


@pytest.mark.parametrize("name, layout", PAIRS)
def test_safetensors_come_back_bit_for_bit(name, layout, runs):
    _, params, _, back, printed = runs(name, layout)
    same(back, params)
    assert layout in printed and ("variances" in printed) == (name in ("dit_ln", "pixart"))


@pytest.mark.parametrize("name, layout", [PAIRS[0], PAIRS[2]])
def test_pickled_weights_come_back_without_running_code(name, layout, tmp_path):
    source = tmp_path / "weights.pt"
    with small():
        fields = {"convert.source": str(source), "model.dtype": "bfloat16"}
        objective = tiny.objective(config(name, **fields))
        params, state = weights(objective, layout)
        tensors = {key: torch.tensor(np.array(a)) for key, a in state.items()}
        if name == "dit_ln":
            tensors["pos_embed"] = torch.tensor(
                np.array(objective.model.positions(jnp.zeros((1, *objective.latent_shape))))
            )[None]
        else:  # a buffer of the published code
            tensors["sideblocks.0.attn.rel_pos_bias.relative_position_index"] = torch.zeros(4, 4)
        torch.save({"ema": tensors}, source)
        same(imported(objective, source, tmp_path / "run"), params)

        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "pwned"), "w"))

        torch.save({"ema": Evil()}, source)
        with pytest.raises(ConfigError, match="cannot be read"):
            importing.run(objective.config, str(tmp_path / "evil"))
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "evil").exists()


def test_an_import_predicts_what_the_original_does_and_trains_on(tmp_path):
    source = tmp_path / "weights.safetensors"
    with small():
        settings = {"convert.source": str(source), "sampling.labels": (1, 2), "sampling.n": 2}
        objective = tiny.objective(config("dit_ln", **settings))
        _, state = weights(objective, "facebookresearch/DiT")
        save_file({key: np.ascontiguousarray(a) for key, a in state.items()}, source)
        params = imported(objective, source, tmp_path / "run")
        model = objective.model
        positions = parity.tensor(model.positions(jnp.zeros((1, *objective.latent_shape))))
        original = parity.references.DiT(
            model.depth, model.width, model.heads, model.patch, 3, model.classes, positions
        )
        parity.load(original, state)
        x = np.random.default_rng(0).normal(size=(2, *objective.latent_shape)).astype(np.float32)
        labels = np.array([1, 3])
        eps = parity.jit(model.apply)({"params": params}, x, parity.T, Cond.of(labels))
        t = torch.tensor(parity.T).long()
        expected = original(torch.tensor(x).permute(0, 3, 1, 2), t, torch.tensor(labels))
        expected = expected.permute(0, 2, 3, 1).detach().numpy()
        assert np.abs(eps - expected).max() < 1e-4 * np.abs(expected).max()

        with pytest.raises(ConfigError, match="diffusion.schedule: linear -> scaled_linear"):
            sample.run(objective.config, str(tmp_path / "run"))
        settings |= LINEAR
        sample.run(config("dit_ln", **settings), str(tmp_path / "run"))
        loop.run(config("dit_ln", steps=2, **settings), str(tmp_path / "run"))
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2]


def diffusers_scheduler(run):
    return DDIMScheduler(
        1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing=run.config.sampling.spacing
    )


def reopened(folder):
    """The objective of a work directory."""
    with small():
        return diffusion.create(folder.load_config(), folder.load_vocabulary())


@pytest.mark.parametrize("name, layout", PAIRS)
def test_published_models_bring_their_noise_levels(name, layout, runs):
    objective, _, folder, _, printed = runs(name, layout)
    run = reopened(folder)
    # These were published with several noise levels, or as flows: the config keeps its own.
    if name in ("unet", "mmdit"):
        np.testing.assert_array_equal(run.schedule.alpha_bar, objective.schedule.alpha_bar)
        assert "noise levels" in printed or "rectified flow" in printed
        return
    assert "linear, beta 0.0001 to 0.02" in printed
    expected = diffusers_scheduler(run).alphas_cumprod
    np.testing.assert_allclose(run.schedule.alpha_bar, expected, rtol=1e-4)


SAMPLED = [("dit_ln", "facebookresearch/DiT")]  # the others have the same noise levels
SAMPLED += [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in PAIRS
    if pair not in SAMPLED and pair[0] not in ("unet", "mmdit")
]


@pytest.mark.parametrize("name, layout", SAMPLED)
def test_imported_models_sample_as_diffusers_does(name, layout, runs):
    """Compare DDIM of the imported run with diffusers' scheduler."""
    _, _, folder, back, _ = runs(name, layout)
    run, params = reopened(folder), {"model": back}
    scheduler = diffusers_scheduler(run)
    scheduler.set_timesteps(5)
    cond = run.example_cond()
    keys = jax.random.split(jax.random.key(1), 1)
    x = initial_noise(keys, run.latent_shape)
    denoise = parity.jit(run.denoise(params))
    expected = torch.tensor(np.array(x))
    for t in scheduler.timesteps:
        eps = torch.tensor(np.array(denoise(expected.numpy(), np.array([t], np.int32), cond)))
        expected = scheduler.step(eps, t, expected).prev_sample
    sample = partial(ddim, run.denoise(params), run.schedule, steps=5)
    result = parity.jit(sample)(x, cond, keys)
    assert np.abs(result - expected.numpy()).max() < 1e-3 * np.abs(expected.numpy()).max()


@pytest.mark.parametrize("field", [*LINEAR, "diffusion.base_resolution"])
def test_other_noise_levels_than_a_layouts_are_refused(field, tmp_path):
    source = tmp_path / "weights.safetensors"
    other = {"diffusion.schedule": "cosine", "diffusion.base_resolution": 8}.get(field, 0.01)
    with small():
        _, state = weights(tiny.objective(config("dit_ln")), "facebookresearch/DiT")
        save_file({key: np.ascontiguousarray(a) for key, a in state.items()}, source)
        fields = {"convert.source": str(source)}
        with pytest.raises(ConfigError, match=f"{field}=.*--config.diffusion.schedule=linear"):
            importing.run(config("dit_ln", **fields, **{field: other}), str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
        if field not in LINEAR:
            return
        with pytest.raises(ConfigError, match=f"{field}="):  # a default chosen explicitly
            importing.run(config("dit_ln", **fields), str(tmp_path / "run"), {field: None})
        importing.run(config("dit_ln", **fields, **LINEAR), str(tmp_path / "run"), LINEAR)


def test_the_command_line_says_which_fields_were_chosen(tmp_path):
    source = tmp_path / "weights.safetensors"
    objective = tiny.objective(config("dit_ln"))
    _, state = weights(objective, "facebookresearch/DiT")
    save_file({key: np.ascontiguousarray(a) for key, a in state.items()}, source)
    command = [sys.executable, "-m", "condiff_jax.main", "--mode=import", f"--workdir={tmp_path}/r"]
    command += ["--config=configs/quickstart.py", "--config.model.name=dit_ln"]
    command += ["--config.data.semantics=class", "--config.model.position=extrapolate"]
    command += ["--config.diffusion.prediction=epsilon", "--config.conditioning.control=()"]
    command += [f"--config.convert.source={source}", "--config.diffusion.schedule=scaled_linear"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "not scaled_linear" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_export_is_refused_with_other_noise_levels(tmp_path):
    with small():
        objective = tiny.objective(config("dit_ln", **LINEAR))
        params = parity.random_like(objective.shapes)
        exporting.export(objective, params, {}, exporting.epath.Path(tmp_path / "export"))
        fields = {"convert.source": str(tmp_path / "export")}
        for other, message in [
            ({}, "trained with other noise levels; set --config.diffusion"),
            (LINEAR | {"diffusion.prediction": "v"}, "predicts epsilon"),
        ]:
            with pytest.raises(ConfigError, match=message):
                importing.run(config("dit_ln", **fields, **other), str(tmp_path / "run"))
        importing.run(config("dit_ln", **fields, **LINEAR), str(tmp_path / "run"))


@pytest.mark.parametrize(
    "overrides, edit, message",
    [
        ({}, lambda s: s.pop("final_layer.linear.bias"), "missing final.bias"),
        ({}, lambda s: s.update(extra=np.zeros(2)), "no rule for extra"),
        ({}, lambda s: s.update({"x_embedder.proj.bias": np.zeros(3)}), "patch_embed.bias is"),
        ({"model.position": "resample"}, None, "model.position=extrapolate"),
        ({"conditioning.control": ("size",)}, None, r"conditioning.control='\(\)'"),
        ({}, lambda s: s.update(pos_embed=np.zeros((1, 16, 32))), "pos_embed .* not the table"),
        ({"model.name": "dit_att"}, None, "facebookresearch/DiT's; set model.name=dit_ln"),
        ({}, lambda s: s.pop("blocks.0.adaLN_modulation.1.weight"), "is none of sail-sg/MDT"),
    ],
)
def test_misfits_are_one_line_that_names_them(overrides, edit, message, tmp_path):
    source = tmp_path / "weights.safetensors"
    with small():
        _, state = weights(tiny.objective(config("dit_ln")), "facebookresearch/DiT")
        if edit:
            edit(state)
        save_file({key: np.float32(np.ascontiguousarray(a)) for key, a in state.items()}, source)
        with pytest.raises(ConfigError, match=message) as error:
            importing.run(
                config("dit_ln", **overrides, **{"convert.source": str(source)}),
                str(tmp_path / "run"),
            )
    assert "\n" not in str(error.value) and str(error.value).startswith("convert.source: ")
    assert not (tmp_path / "run").exists()


def test_sources_that_are_not_there_are_named(tmp_path):
    for source, message in [
        ("", "convert.source: empty"),
        (str(tmp_path / "none.pt"), "does not exist"),
        (str(tmp_path), "no weights"),
    ]:
        with pytest.raises(ConfigError, match=message):
            importing.run(config("dit_ln", **{"convert.source": source}), str(tmp_path / "run"))


def test_hub_ids_are_fetched(monkeypatch, tmp_path):
    fetched = []

    def snapshot_download(name, allow_patterns):
        fetched.append(name)
        if name != "owner/model":
            raise OSError("no such repository")
        if "*.bin" in allow_patterns:
            torch.save({"a": torch.zeros(2)}, tmp_path / "x.bin")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "x.safetensors")
    np.testing.assert_array_equal(importing.weights.read("owner/model")["a"], [1, 1])
    with pytest.raises(FileNotFoundError, match="owner/none is neither a path nor on the hub"):
        importing.weights.read("owner/none")
    importing.weights.read(str(tmp_path))
    assert fetched == ["owner/model", "owner/none"]
    # Without safetensors the pickled weights are fetched too.
    (tmp_path / "x.safetensors").unlink()
    np.testing.assert_array_equal(importing.weights.read("owner/model")["a"], [0, 0])
    assert fetched[2:] == ["owner/model"] * 2
    # A pipeline's part comes before another copy of the model at its top.
    (tmp_path / "unet").mkdir()
    save_file({"a": np.full(2, 2, np.float32)}, tmp_path / "unet" / "x.safetensors")
    np.testing.assert_array_equal(importing.weights.read(str(tmp_path))["a"], [2, 2])


def test_a_run_is_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="has a run already"):
        importing.run(config("dit_ln", **{"convert.source": "x"}), str(tmp_path))
