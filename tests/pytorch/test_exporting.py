"""Mode `export`: exported folders load in PyTorch and diffusers, sample alike, and import again."""

import contextlib
import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import parity
from condiff_jax.conditioning.cond import Cond, Text
from condiff_jax.config.errors import ConfigError
from condiff_jax.diffusion.guidance import dual_guidance
from condiff_jax.diffusion.sampler import ddim, initial_noise
from condiff_jax.models import unet
from condiff_jax.pytorch import exporting, importing
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.sampling.requests import create_batch
from tests import clips, tiny

CLASS = {"data.semantics": "class"}
OFF = {"conditioning.control": (), "model.qk_norm": False}
VARIANTS = {
    "ours": {"model.name": "ours"},
    "ours, classes, v": {"model.name": "ours", **CLASS, "diffusion.prediction": "v"},
    "mmdit": {"model.name": "mmdit"},
    "mmdit full": {"model.name": "mmdit", "model.streams": "full", "conditioning.control": ()},
    "dit_ln": {"model.name": "dit_ln", **CLASS},
    "dit_att": {"model.name": "dit_att", "conditioning.weighting": "linear"},
    "mdtv2": {"model.name": "mdtv2", **CLASS},
    "pixart": {"model.name": "pixart", **OFF},
    "unet": {"model.name": "unet", "model.size": "tiny", **OFF},
}
IN_DIFFUSERS = ("mmdit full", "pixart", "unet")


@contextlib.contextmanager
def small():
    """Patch model sizes to few arrays."""
    size = unet.Size((16, 32), (False, True), 16, head_size=8, resnets=1)
    with mock.patch.dict(unet.SIZES, {"tiny": size}), tiny.few_layers():
        yield


def create(name, **overrides):
    """(objective, random parameters) of a variant.

    The last layer is small, because otherwise ten steps amplify rounding errors too much.
    """
    objective = tiny.objective(tiny.config(**VARIANTS[name], **overrides))
    params = parity.random_like(objective.shapes)
    last = params["model"]["conv_out" if name == "unet" else "final"]
    last["kernel"] *= 0.1
    return objective, params


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A cached function of a variant: (objective, parameters, folder, messages)."""
    cache = {}

    def get(name):
        if name not in cache:
            with small():
                objective, params = create(name)
            out = exporting.epath.Path(tmp_path_factory.mktemp("export"))
            messages = exporting.export(objective, params, {}, out)
            cache[name] = (objective, params, out, messages)
        return cache[name]

    return get


@pytest.mark.parametrize("name", VARIANTS)
def test_exports_come_back_bit_for_bit(name, exported, tmp_path):
    objective, params, out, _ = exported(name)
    with small():
        back, _ = importing.convert(objective, importing.weights.read(str(out)))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("name", VARIANTS)
def test_ten_steps_in_pytorch_are_ours(name, exported):
    objective, params, out, _ = exported(name)
    text = objective.text_encoder is not None
    inputs = ["a red circle", "blue ring left"] if text else [1, 4]
    batch = create_batch(objective, inputs)
    keys = jax.random.split(jax.random.key(3), 2)
    noise = jax.random.normal(keys[0], (2, 8, 16)) if text else None
    x = initial_noise(keys, objective.latent_shape)

    @parity.jit
    def sample(params, batch):
        cond = objective.condition(params, batch, noise)
        denoise = dual_guidance(objective.denoise(params), 3.0, 1.375)
        return ddim(
            denoise, objective.schedule, x, cond, keys, steps=10, clip=objective.autoencoder.bound
        )

    expected = np.asarray(sample(params, batch))
    pipe = load(out)
    named = {"prompt": inputs} if text else {"class_labels": inputs}
    result = pipe(
        **named,
        guidance_scale=3.0,
        control_guidance_scale=1.375,
        num_inference_steps=10,
        latents=parity.tensor(x).permute(0, 3, 1, 2),
        text_noise=None if noise is None else parity.tensor(noise),
        output_type="latent",
    ).images
    result = result.permute(0, 2, 3, 1).numpy()
    assert np.abs(result - expected).max() < 1e-3 * np.abs(expected).max()
    assert pipe(**named, output_type="np").images.shape == (2, 16, 16, 3)


def load(out, **settings):
    """Load an exported folder as a diffusers pipeline without progress bars."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(str(out), trust_remote_code=True, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pipelines_are_moved_and_cast_as_diffusers_does(exported):
    out = exported("ours")[2]
    pipe = load(out).to("cpu")
    assert pipe.device == torch.device("cpu") and pipe.dtype == torch.float32
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert pipe.to(torch.float16).dtype == torch.float16
    meta = load(out).to("meta")
    assert meta.device.type == "meta"
    assert all(parameter.is_meta for parameter in meta.network.parameters())
    for dtype in (torch.bfloat16, torch.float16):
        pipe = load(out, dtype=dtype)
        assert {parameter.dtype for parameter in pipe.network.parameters()} == {dtype}
        assert pipe.dtype == dtype


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_is_close_with_every_padding(name, exported):
    objective, _, out, _ = exported(name)
    text = objective.text_encoder is not None
    inputs = {"prompt": ["a red circle", "ring"]} if text else {"class_labels": [1, 4]}
    draw = partial(torch.randn, generator=torch.manual_seed(0))
    x, noise = draw(2, 3, 16, 16), draw(2, 8, 16)

    @torch.no_grad()
    def predict(pipe):
        semantics = pipe.embed(inputs["prompt"], noise) if text else torch.tensor([1, 4])
        control = pipe.network.control({}, 2)
        return pipe.guided(x.to(pipe.dtype), torch.tensor(500), semantics, control, 2.0, 1.375)

    exact, *halves = (load(out) for _ in range(3))
    for pipe in (exact, *halves):
        for weight in pipe.network.model.parameters():
            if weight.ndim > 1:  # large random weights would overflow the UNet's activations
                weight.data *= 0.5
    for pipe, dtype, error in zip(
        halves, (torch.bfloat16, torch.float16), (0.05, 0.006), strict=True
    ):
        pipe.to(dtype)
        for padding in ("zero", "replicate", "noisy_replicate") if text else (None,):
            exact.network.settings["padding"] = pipe.network.settings["padding"] = padding
            expected, result = predict(exact), predict(pipe)
            assert result.dtype == dtype
            assert (result.float() - expected).std() < error * expected.std()
        images = pipe(**inputs, num_inference_steps=2, output_type="np").images  # draws its noise
        assert np.isfinite(images).all()


def test_arguments_default_to_the_settings_of_the_config(exported):
    objective, _, out, _ = exported("ours")
    pipe = load(out)
    x = torch.randn(1, 3, 16, 16, generator=torch.manual_seed(0))
    common = {"latents": x, "text_noise": torch.zeros(1, 8, 16), "output_type": "latent"}
    settings = objective.config.sampling
    explicit = {
        "guidance_scale": settings.guidance,
        "control_guidance_scale": settings.control_guidance,
        "num_inference_steps": settings.steps,
        "control": {"height": 16, "width": 16, "crop_height": 1.0},
    }
    plain = pipe("a ring", **common).images
    torch.testing.assert_close(plain, pipe("a ring", **common, **explicit).images, rtol=0, atol=0)
    for name, value in explicit.items():
        other = {"height": 96} if name == "control" else value + 1
        changed = pipe("a ring", **common, **(explicit | {name: other})).images
        assert (changed - plain).abs().max() > 1e-3, name


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_diffusers_loads_the_denoiser(name, exported):
    objective, params, out, messages = exported(name)
    side, _, channels = objective.latent_shape
    name_in_diffusers = json.loads((out / "diffusers/config.json").read_text())["_class_name"]
    model = getattr(diffusers, name_in_diffusers).from_pretrained(str(out / "diffusers")).eval()
    assert messages[0].startswith(f"diffusers: {name_in_diffusers} in ")
    draw = np.random.default_rng(0).normal
    x, tokens = (np.float32(draw(size=s)) for s in ((2, side, side, channels), (2, 5, 16)))
    cond = Cond.of(Text(jnp.asarray(tokens), jnp.ones((2, 5), bool), jnp.asarray(tokens[:, 0])))
    eps = parity.jit(objective.model.apply)({"params": params["model"]}, x, parity.T, cond)
    call = {"pixart": parity.call_pixart, "mmdit full": parity.call_sd3}.get(name)
    args = (torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(parity.T).long())
    with torch.no_grad():
        out = call(model, *args, cond) if call else model(*args, torch.tensor(tokens)).sample
    out = out.permute(0, 2, 3, 1).numpy()
    assert np.abs(eps - out).max() < 1e-4 * np.abs(out).max()


@pytest.mark.parametrize(
    "name, overrides, reason",
    [
        ("ours", {}, "control"),
        ("ours", {"conditioning.control": ()}, "has no ours"),
        ("dit_ln", {"conditioning.control": ()}, "i/127"),
        ("mmdit", {"conditioning.control": ()}, "streams=full"),
        ("pixart", {"model.qk_norm": True}, "qk_norm"),
        ("unet", {"model.qk_norm": True}, "qk_norm"),
        ("pixart", CLASS, "no classes"),
    ],
)
def test_models_that_diffusers_lacks_raise_with_the_reason(name, overrides, reason):
    objective = tiny.objective(tiny.config(**(VARIANTS[name] | overrides)))
    with pytest.raises(ValueError, match=reason):
        exporting.for_diffusers(objective)


def test_unet2d_has_no_pytorch_model(tmp_path):
    fields = {"model.name": "unet2d", "model.size": "tiny", "data.semantics": "class"}
    with pytest.raises(ConfigError, match="model.name: unet2d has no PyTorch model"):
        exporting.run(tiny.config(**fields), str(tmp_path))


def test_the_network_needs_torch_and_safetensors_only(exported):
    out = exported("ours")[2]
    code = """if 1:
        import sys
        import models
        network = models.load(".")
        text = network.embed(["a red circle"])
        import torch
        control = network.control({"height": 48}, 1)
        eps = network.model(torch.zeros(1, 3, 16, 16), torch.tensor([5]), text, control)
        assert eps.shape == (1, 3, 16, 16)
        assert not {"jax", "flax", "diffusers", "transformers"} & set(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=out / "network", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_control_values_are_named(exported):
    out = exported("ours")[2]
    pipe = load(out)
    control = pipe.network.control({"height": 96, "crop_top": 0.25}, 2)
    high, low = jax_control(exported("ours")[0], height=96, crop_top=0.25)
    np.testing.assert_allclose(control.high, high, rtol=1e-6)
    np.testing.assert_allclose(control.low, low, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown control value 'zoom', choose from crop_top"):
        pipe.network.control({"zoom": 1}, 1)
    with pytest.raises(ValueError, match="pass prompt"):
        pipe(class_labels=3)


@pytest.mark.parametrize("with_autoencoder", [True, False])
def test_latents_are_decoded_if_the_autoencoder_is_there(with_autoencoder, tmp_path):
    latents = {"autoencoder.name": "kl", "autoencoder.size": "tiny", "autoencoder.scale": 0.5}
    with small():
        objective, params = create("dit_ln", **latents, **{"autoencoder.shift": 0.1})
    network = objective.autoencoder.network
    image = jnp.zeros((1, 16, 16, 3))
    frozen = parity.random_like(jax.eval_shape(network.init, jax.random.key(0), image)["params"])
    parts = {"autoencoder": frozen} if with_autoencoder else {}
    exporting.export(objective, params, parts, exporting.epath.Path(tmp_path))
    pipe = load(tmp_path)
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)
    nchw = torch.tensor(x).permute(0, 3, 1, 2)
    if not with_autoencoder:
        with pytest.raises(ValueError, match="without an autoencoder"):
            pipe.network.decode(nchw)
        assert pipe(class_labels=1, output_type="latent").images.shape == (1, 4, 4, 4)
        return
    images = pipe.network.decode(nchw).permute(0, 2, 3, 1).detach().numpy()
    images = np.clip(np.round((images + 1) * 127.5), 0, 255)
    assert np.abs(parity.jit(objective.autoencoder.decode)(frozen, x) - images).max() <= 1
    half = pipe.to(torch.bfloat16)(class_labels=1, num_inference_steps=2, output_type="np")
    assert half.images.shape == (1, 16, 16, 3) and np.isfinite(half.images).all()


@pytest.mark.parametrize("form", [Path, clips.split], ids=["CLIP's", "Stable Diffusion's"])
def test_clip_is_named_and_its_features_are_ours(tmp_path, form):
    source = form(clips.write(tmp_path / "clip"))
    fields = {"text_encoder.name": "clip", "text_encoder.path": str(source)}
    with small():
        objective, params = create("mmdit", **fields)
    out = exporting.epath.Path(tmp_path / "export")
    exporting.export(objective, params, {}, out)
    pipe = load(out)
    assert set(pipe.network) == {"model"} and pipe.network.settings["clip"] == str(source)
    prompts = ["a red circle", "", "blue " * 20]
    noise = np.random.default_rng(0).normal(size=(3, 8, 16)).astype(np.float32)
    params = {**params, **objective.load_frozen()}
    batch = create_batch(objective, prompts)
    expected = parity.jit(objective.condition)(params, batch, noise).semantics
    with torch.no_grad():
        text = pipe.embed(prompts, torch.tensor(noise))
    np.testing.assert_allclose(text.tokens, expected.tokens, atol=1e-5)
    np.testing.assert_allclose(text.pooled, expected.pooled, atol=1e-5)
    if form is Path:
        return
    pipe.to(torch.bfloat16)
    assert pipe("a ring", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        (
            {"autoencoder.name": "vq", "autoencoder.path": "VQ"},
            "network/ has no VQModel",
        ),
        ({"autoencoder.name": "kl"}, "autoencoder.path is empty"),
    ],
)
def test_autoencoders_that_are_left_out(fields, word, tmp_path, monkeypatch, capsys):
    with small():
        objective, params = create("dit_ln", **fields, **{"autoencoder.size": "tiny"})
        Workdir(str(tmp_path)).open(objective.config, objective.vocabulary)
        checkpoints = mock.Mock(latest=2, **{"restore_params.return_value": (2, params)})
        monkeypatch.setattr("condiff_jax.runs.run.Checkpoints", lambda *_: checkpoints)
        out = exporting.run(objective.config, str(tmp_path))
    printed = capsys.readouterr().out
    assert f"no autoencoder, as {word}" in printed
    assert "samples are latents" in printed and len(printed.splitlines()) == 3
    names = importing.weights.read(str(out))
    assert names and all(name.startswith("model.") for name in names)


def jax_control(objective, **values):
    """(high, low) of these control values, from the JAX objective."""
    control = dataclasses.replace(objective.config.sampling.control, **values)
    sampling = dataclasses.replace(objective.config.sampling, control=control)
    config = dataclasses.replace(objective.config, sampling=sampling)
    batch = create_batch(dataclasses.replace(objective, config=config), ["a", "b"])
    embedded = objective.control.control(batch["control"])
    return np.asarray(embedded.high), np.asarray(embedded.low)


def test_a_run_is_exported_with_ema_or_raw_parameters(tmp_path, capsys):
    with small():
        objective, params = create("dit_ln")
        config = objective.config
        folder = Workdir(str(tmp_path))
        folder.open(config, objective.vocabulary)
        trained = state.create(params, optimizer.create(config))
        trained = trained.replace(params=jax.tree.map(lambda a: np.asarray(a) + 1, params))
        checkpoints = Checkpoints(folder.checkpoints, config, create=True)
        checkpoints.save(2, trained, 0.0)
        checkpoints.close()
        ema = exporting.run(config, str(tmp_path))
        raw = exporting.run(
            tiny.config(**VARIANTS["dit_ln"], **{"convert.raw": True}), str(tmp_path)
        )
    assert (ema.name, raw.name) == ("2", "2-raw")
    both = [importing.weights.read(str(out)) for out in (ema, raw)]
    for name, tensor in both[0].items():
        np.testing.assert_array_equal(both[1][name], tensor + 1)
    assert "Step 2 for PyTorch in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no run here"):
        exporting.run(config, str(tmp_path / "nothing"))
