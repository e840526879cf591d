"""The PyTorch models equal the JAX models: names, shapes, outputs, text, folders and errors."""

import dataclasses
import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.parity import jit, random_like, tensor
from condiff_jax.conditioning import control
from condiff_jax.conditioning.cond import Cond, Control, Text
from condiff_jax.conditioning.text import PADDINGS, pad
from condiff_jax.models import MODELS, kl, layers, mmdit, text_encoder, unet
from condiff_jax.pretrained.layout import from_torch, to_torch
from condiff_jax.pytorch import models

CHANNELS, CLASSES, TEXT, POOLED, HIGH, LOW = 3, 5, 12, 10, 3, 2
T = np.array([3, 200, 700], np.int32)  # nothing dropped; semantics dropped; control dropped
COSINE = control.Weighting("cosine", alpha=2.0)  # alpha = 8 is nearly zero at t = 700
TRANSFORMER = {"depth": 2, "width": 32, "heads": 2, "patch": 2, "base_grid": 3}
UNET = {  # heads by number or by size; one level with two ResNet blocks; three levels
    "class": unet.Size((16, 32), (False, True), context=TEXT, head_size=8, resnets=1),
    "text": unet.Size((16,), (True,), context=TEXT, heads=2, resnets=2),
    "deep": unet.Size((8, 16, 16), (False, True, False), context=TEXT, heads=2, resnets=1),
}
SETTINGS = {
    "dit_ln": TRANSFORMER,
    "dit_att": TRANSFORMER | {"cross": True},
    "pixart": TRANSFORMER,
    "mdtv2": TRANSFORMER | {"depth": 8},  # two blocks in each half of the encoder
    "mmdit": TRANSFORMER | {"pooled": True},
    "ours": TRANSFORMER,
    "unet": {},
}
# (architecture, number of classes or None for text, other settings)
VARIANTS = [
    ("dit_ln", CLASSES, {}),
    ("dit_att", None, {}),
    ("dit_att", CLASSES, {"position": "extrapolate"}),
    ("pixart", None, {}),
    ("mdtv2", CLASSES, {}),
    ("mmdit", CLASSES, {"streams": "shared"}),
    ("mmdit", None, {"streams": "qkv"}),
    ("mmdit", None, {"streams": "full"}),
    ("mmdit", None, {"streams": "full", "qk_norm": False}),
    ("ours", None, {"streams": "qkv"}),
    ("ours", CLASSES, {"streams": "shared"}),
    ("unet", CLASSES, {"size": UNET["class"]}),
    ("unet", None, {"size": UNET["text"], "qk_norm": False}),
]
# Other combinations of these settings.
SLOW = [
    ("dit_att", None, {"qk_norm": False, "position": "extrapolate"}),
    ("dit_att", CLASSES, {}),
    ("pixart", CLASSES, {}),
    ("pixart", None, {"qk_norm": False}),
    ("mmdit", None, {"streams": "shared"}),
    ("mmdit", CLASSES, {"streams": "qkv"}),
    ("mmdit", CLASSES, {"streams": "full"}),
    ("ours", None, {"streams": "qkv", "qk_norm": False}),
    ("ours", None, {"streams": "full"}),
    ("unet", None, {"size": UNET["text"]}),
    ("unet", None, {"size": UNET["deep"], "qk_norm": False}),
]
SQUARE, OTHER = (4, 4), (8, 4)  # of the latents
CASES = [(*variant, SQUARE) for variant in VARIANTS]
# Positions are compared at another resolution too: MDTv2 learns them, the others compute them.
CASES += [("dit_ln", CLASSES, {}, OTHER), ("mdtv2", CLASSES, {}, (8, 8))]
SLOW_CASES = [(*variant, SQUARE) for variant in SLOW] + [
    (*variant, OTHER) for variant in VARIANTS if variant[0] not in ("dit_ln", "mdtv2")
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def condition(classes, pooled=TEXT):
    """A batch of three conditions: full, without semantics, without control."""
    semantics = jnp.array([1, 2, 4])
    if classes is None:
        tokens, vector = jnp.asarray(normal(3, 5, TEXT)), jnp.asarray(normal(3, pooled, seed=1))
        semantics = Text(tokens, jnp.ones((3, 5), bool), vector)
    # The implementations differ most in sinusoids of large scalars, so stay in the real range.
    scalars = np.random.default_rng(2).uniform(0, 1000, (3, HIGH + LOW)).astype(np.float32)
    high, low = jnp.split(jnp.asarray(scalars), [HIGH], axis=1)
    cond = Cond.of(semantics, Control(high, low))
    return cond.replace(drop_semantics=jnp.arange(3) == 1, drop_control=jnp.arange(3) == 2)


def build(name, classes, own, side):
    """(JAX model, random parameters, condition, config of the PyTorch model)."""
    settings = SETTINGS[name] | own
    pooled = POOLED if settings.get("streams") == "full" else TEXT
    cond = condition(classes, pooled)
    model = MODELS[name].module(classes=classes, weighting=COSINE, **settings)
    x = normal(3, side, side, CHANNELS)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), x, T, cond)["params"])
    for fixed in ("cross", "pooled"):  # implied by the architecture
        settings.pop(fixed, None)
    config = {"architecture": name, "channels": CHANNELS, "high": HIGH, "low": LOW} | settings
    config |= {"classes": classes, "weighting": COSINE(np.arange(COSINE.timesteps)).tolist()}
    if classes is None:
        config["text_width"] = TEXT
    if name == "mmdit":
        config["pooled_width"] = pooled
    if name == "mdtv2":
        config["grid"] = side // 2
    if name == "unet":
        config["size"] = dataclasses.asdict(config["size"])
    return model, params, cond, json.loads(json.dumps(config))


def check_names_and_shapes(module, params):
    """The state dict is `to_torch` of the JAX parameters, and `from_torch` is its inverse."""
    state = to_torch(params)
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    assert shapes == {name: value.shape for name, value in state.items()}
    jax.tree.map(np.testing.assert_array_equal, from_torch(state, params), params)


def load(module, params):
    """Load JAX parameters into the PyTorch model."""
    module.load_state_dict({name: tensor(a) for name, a in to_torch(params).items()})
    return module.eval()


def nchw(a):
    return tensor(a).permute(0, 3, 1, 2)


@partial(jit, static_argnums=0)
def forward(model, params, x, cond):
    return model.apply({"params": params}, x, T, cond)


@torch.no_grad()
def torch_forward(module, x, cond, **changes):
    """eps (B, H, W, C) of the PyTorch model."""
    semantics = cond.semantics
    if isinstance(semantics, Text):
        semantics = models.Text(tensor(semantics.tokens), tensor(semantics.pooled))
    else:
        semantics = tensor(semantics)
    inputs = {
        "control": models.Control(tensor(cond.control.high), tensor(cond.control.low)),
        "drop_semantics": tensor(cond.drop_semantics),
        "drop_control": tensor(cond.drop_control),
    }
    out = module(nchw(x), torch.tensor(T), semantics, **(inputs | changes))
    return out.permute(0, 2, 3, 1).numpy()


def relative(expected, actual):
    assert expected.shape == actual.shape
    return np.abs(expected - actual).max() / max(np.abs(expected).max(), 1e-6)


@pytest.mark.parametrize("name, classes, own, shape", CASES)
def test_equals_the_jax_model(name, classes, own, shape):
    model, params, cond, config = build(name, classes, own, shape[0])
    module = models.create(config)
    check_names_and_shapes(module, params)
    load(module, params)
    x = normal(3, *shape, CHANNELS, seed=4)
    assert relative(forward(model, params, x, cond), torch_forward(module, x, cond)) < 1e-4


def test_every_architecture_is_compared():
    exported = set(MODELS) - {"unet2d"}
    assert {name for name, *_ in VARIANTS} == exported
    streams = {own["streams"] for name, _, own in VARIANTS if name == "mmdit"}
    assert streams == set(mmdit.STREAMS)
    assert exported | {"words", "kl"} == set(models.ARCHITECTURES)


@pytest.fixture(scope="module")
def ours():
    """(PyTorch model of `ours` with text, condition, config)."""
    _, params, cond, config = build("ours", None, {"streams": "qkv"}, 4)
    return load(models.create(config), params), cond, config


def test_inputs_that_are_left_out_have_no_effect(ours):
    module, cond, _ = ours
    x, every = normal(3, 4, 4, CHANNELS), torch.ones(3, dtype=torch.bool)
    default = torch_forward(module, x, cond, drop_semantics=None, drop_control=None)
    explicit = torch_forward(module, x, cond, drop_semantics=~every, drop_control=~every)
    np.testing.assert_array_equal(default, explicit)
    without = torch_forward(module, x, cond, control=None)
    np.testing.assert_allclose(without, torch_forward(module, x, cond, drop_control=every))
    tokens = cond.replace(semantics=cond.semantics.replace(pooled=normal(3, TEXT, seed=9)))
    np.testing.assert_array_equal(torch_forward(module, x, cond), torch_forward(module, x, tokens))
    # `ours` has no pooled text as input, so that Text(tokens) is enough.
    out = module(nchw(x), torch.tensor(T), models.Text(tensor(cond.semantics.tokens)))
    np.testing.assert_allclose(
        out.detach().permute(0, 2, 3, 1),
        torch_forward(module, x, cond, control=None, drop_semantics=None),
        atol=1e-5,
    )


def test_bf16_is_close_to_f32(ours):
    module, cond, config = ours
    x = normal(3, 4, 4, CHANNELS)
    expected = torch_forward(module, x, cond)
    half = models.Text(
        *(tensor(a).bfloat16() for a in (cond.semantics.tokens, cond.semantics.pooled))
    )
    state = {name: value.bfloat16() for name, value in module.state_dict().items()}
    module = models.create(config).bfloat16()
    module.load_state_dict(state)
    scalars = models.Control(tensor(cond.control.high), tensor(cond.control.low))
    flags = tensor(cond.drop_semantics), tensor(cond.drop_control)
    out = module(nchw(x).bfloat16(), torch.tensor(T), half, scalars, *flags)
    assert out.dtype == torch.bfloat16
    out = out.detach().float().permute(0, 2, 3, 1).numpy()
    error = np.sqrt(np.mean((out - expected) ** 2) / np.mean(expected**2))
    assert 1e-4 < error < 0.05


# ---------------------------------------------------------------------------------------------
# Norms, control and positions


def test_norms_of_small_values():
    """Their epsilon matters here."""
    x = 1e-3 * normal(2, 5, 8)
    np.testing.assert_allclose(models.layer_norm(tensor(x)), layers.layer_norm(x), rtol=1e-4)
    scale, norm = 1 + normal(8), nn.RMSNorm(epsilon=1e-6)
    out = load(models.RMSNorm(8), {"scale": scale})(tensor(x)).detach()
    np.testing.assert_allclose(out, norm.apply({"params": {"scale": scale}}, x), rtol=1e-4)


@pytest.mark.parametrize("high, low", [(2, 3), (2, 0), (0, 3)])
@pytest.mark.parametrize("kind", control.WEIGHTINGS)
def test_control_embedding(kind, high, low):
    weighting = control.Weighting(kind, alpha=4.0, last=400, timesteps=800)
    model, t = control.ControlEmbed(16, weighting), jnp.array([0, 399, 400, 401, 799])
    scalars = Control(500 * normal(5, high), 500 * normal(5, low, seed=1))
    keep = jnp.zeros(5, bool)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), scalars, t, keep)["params"])
    expected = model.apply({"params": params}, scalars, t, keep)
    module = models.ControlEmbed(16, weighting(np.arange(800)).tolist(), high, low)
    out = load(module, params)(models.Control(*map(tensor, (scalars.high, scalars.low))), tensor(t))
    assert relative(expected, out.detach().numpy()) < 1e-4
    gamma = module.weighting(tensor(t))
    np.testing.assert_allclose(gamma, weighting(t), atol=1e-6)
    half = module.weighting(torch.tensor([399.5]))  # some schedulers have fractional timesteps
    np.testing.assert_allclose(half, gamma[1:3].mean(), atol=1e-6)


@pytest.mark.parametrize("mode", ["resample", "extrapolate"])
def test_positions(mode):
    axes = (models.position_grid(n, 3, mode) for n in (2, 5))
    out = models.position_embedding(16, *axes).float()
    np.testing.assert_allclose(out, layers.position_embedding(16, 2, 5, 3, mode), atol=1e-6)


def test_patches():
    x = normal(2, 4, 6, CHANNELS)
    out = models.patchify(nchw(x), 2)
    np.testing.assert_array_equal(out, layers.patchify(jnp.asarray(x), 2))
    np.testing.assert_array_equal(models.unpatchify(out, 2, 4, 6), nchw(x))


# ---------------------------------------------------------------------------------------------
# Text and autoencoder

CAPTIONS = [
    "A red square, and a small BLUE circle.",
    "",
    "it's <end> of <unk>!",
    "naïve caf\N{KELVIN SIGN} İ ΑΣ red-square 12red",
    "a " * 20,
]
WORDS = ["a", "red", "square", "blue", "circle", "it's", "end", "k", "red"]


@pytest.fixture(scope="module")
def tokenizer():
    return text_encoder.word_tokenizer(WORDS)


@pytest.mark.parametrize("length", [1, 4, 12])
def test_tokenizer(tokenizer, length):
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    ids, mask = models.tokenize(words, CAPTIONS, length)
    rows = [text_encoder.tokenize(tokenizer, caption, length) for caption in CAPTIONS]
    np.testing.assert_array_equal(ids, [row for row, _ in rows])
    np.testing.assert_array_equal(mask, [row for _, row in rows])


def test_word_embedding():
    ids = np.random.default_rng(0).integers(9, size=(4, 6)).astype(np.int32)
    mask = np.arange(6) < np.array([[1], [3], [6], [0]])
    model = text_encoder.WordEmbedding(vocabulary=9, width=8)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), ids, mask)["params"])
    expected = model.apply({"params": params}, ids, mask)
    module = models.create({"architecture": "words", "vocabulary": 9, "width": 8, "length": 6})
    check_names_and_shapes(module, params)
    with torch.no_grad():
        out = load(module, params)(tensor(ids), tensor(mask))
    np.testing.assert_allclose(out.tokens, expected.tokens, atol=1e-6)
    np.testing.assert_allclose(out.pooled, expected.pooled, atol=1e-6)


@pytest.mark.parametrize("method", PADDINGS)
def test_padding(method):
    tokens, noise = normal(5, 7, 4), normal(5, 7, 4, seed=1)
    mask = np.arange(7) < np.array([[1], [2], [4], [7], [0]])
    text = Text(jnp.asarray(tokens), jnp.asarray(mask), jnp.zeros((5, 4)))
    expected = pad(text, method, beta=0.3, noise=noise).tokens
    out = models.pad(*map(tensor, (tokens, mask)), method, beta=0.3, noise=tensor(noise))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_autoencoder():
    size = kl.Size((8, 16), latent=3, resnets=1)
    model = kl.AutoencoderKL(size)
    images, latents = normal(2, 8, 4, 3), normal(2, 4, 2, 3)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), images)["params"])
    module = models.create({"architecture": "kl", "size": dataclasses.asdict(size)})
    check_names_and_shapes(module, params)
    load(module, params)

    @jit
    def run(params, images, latents):
        moments = model.apply({"params": params}, images, method="encode")
        decoded = model.apply({"params": params}, latents, method="decode")
        return moments, kl.mean_and_std(100 * moments), decoded

    moments, (mean, std), decoded = run(params, images, latents)
    with torch.no_grad():
        out = module.encode(nchw(images))
        assert relative(moments, out.permute(0, 2, 3, 1).numpy()) < 1e-4
        assert relative(decoded, module.decode(nchw(latents)).permute(0, 2, 3, 1).numpy()) < 1e-4
        clipped = models.mean_and_std(100 * nchw(moments))
        for expected, actual in zip((mean, std), clipped, strict=True):
            assert relative(expected, actual.permute(0, 2, 3, 1).numpy()) < 1e-5
        torch.testing.assert_close(module(nchw(images)), module.decode(out[:, :3]))


# ---------------------------------------------------------------------------------------------
# Folders and errors


def test_load(tmp_path, ours):
    module, cond, config = ours
    words = {"architecture": "words", "vocabulary": 9, "width": TEXT, "length": 5}
    parts = torch.nn.ModuleDict({"model": module, "text_encoder": models.create(words)})
    save_file(parts.state_dict(), tmp_path / "model.safetensors")
    config = {"model": config, "text_encoder": words, "settings": {"text_shape": [5, TEXT]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = models.load(tmp_path)
    assert set(loaded) == {"model", "text_encoder"} and not loaded.training
    assert loaded.settings == {"text_shape": [5, TEXT]} and loaded.text_shape == (5, TEXT)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    x = normal(3, 4, 4, CHANNELS)
    np.testing.assert_array_equal(
        torch_forward(loaded["model"], x, cond), torch_forward(module, x, cond)
    )


def test_errors(ours):
    module, cond, config = ours
    x = normal(3, 4, 4, CHANNELS)
    with pytest.raises(ValueError, match="unknown architecture 'dit', choose from ours, mmdit"):
        models.create({"architecture": "dit"})
    with pytest.raises(ValueError, match="unknown streams 'both', choose shared, qkv or full"):
        models.create(config | {"streams": "both"})
    with pytest.raises(ValueError, match=r"takes \(3, 2\) control scalars, got \(3, 1\)"):
        few = models.Control(torch.zeros(3, HIGH), torch.zeros(3, 1))
        torch_forward(module, x, cond, control=few)
    with pytest.raises(ValueError, match="unknown position embedding 'learned', choose"):
        models.position_grid(3, 3, "learned")
    with pytest.raises(ValueError, match="unknown padding 'mirror', choose from zero"):
        models.pad(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), "mirror")
    mdt = models.MDT(grid=2, channels=CHANNELS, classes=CLASSES, **TRANSFORMER)
    with pytest.raises(ValueError, match="takes 2 tokens a side, got 4 x 1"):
        mdt.embed_positions(4, 1)
