"""AutoencoderKL: parity with diffusers' class of that name, and Stable Diffusion's size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as DiffusersKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from flax.traverse_util import flatten_dict

from condiff_jax.models.kl import SIZES, AutoencoderKL, Size, mean_and_std

SMALL = Size((8, 16), latent=3)

# Compiling takes all the time here: ask for less of it, and share programs between tests.
CHEAP = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = partial(jax.jit, compiler_options=CHEAP)


def pictures(height, width, seed=0, channels=3):
    shape = (2, height, width, channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def random_like(shapes, seed=0):
    """Parameters that leave nothing zero, not even what starts there."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path[-1].key == "scale" else 0.0
        size = (leaf.size // leaf.shape[-1]) ** -0.5 if leaf.ndim > 1 else 0.2
        return jnp.asarray(centre + size * generator.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def build(size=SMALL, **settings):
    """(model, random parameters)."""
    model = AutoencoderKL(size, **settings)
    shapes = jax.eval_shape(model.init, jax.random.key(0), pictures(8, 8))["params"]
    return model, random_like(shapes)


@partial(jit, static_argnums=(0, 1))
def run(model, method, params, x):
    return model.apply({"params": params}, x, method=method)


# ---------------------------------------------------------------------------------------------
# Parity with diffusers: (ours, theirs); every module has a kernel or scale, and a bias.

OUTSIDE = (
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
    ("encoder/conv_in", "encoder.conv_in"),
    ("encoder/norm_out", "encoder.conv_norm_out"),
    ("encoder/conv_out", "encoder.conv_out"),
    ("decoder/conv_in", "decoder.conv_in"),
    ("decoder/norm_out", "decoder.conv_norm_out"),
    ("decoder/conv_out", "decoder.conv_out"),
)
RESNET = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("shortcut", "conv_shortcut"),
)
ATTENTION = (
    ("norm", "group_norm"),
    ("query/linear", "to_q"),
    ("key/linear", "to_k"),
    ("value/linear", "to_v"),
    ("out/linear", "to_out.0"),
)


def table(size):
    """(ours, theirs) for every module that an autoencoder of this size can have."""
    pairs, parts = list(OUTSIDE), []
    for coder in ("encoder", "decoder"):
        parts.append((f"{coder}/mid", f"{coder}.mid_block"))
        attention = f"{coder}.mid_block.attentions.0"
        pairs += [(f"{coder}/mid_attention/{a}", f"{attention}.{b}") for a, b in ATTENTION]
    for level in range(len(size.channels)):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        parts += [(f"encoder/down_{level}", down), (f"decoder/up_{level}", up)]
        pairs.append((f"encoder/down_{level}_downsample", f"{down}.downsamplers.0.conv"))
        pairs.append((f"decoder/up_{level}_upsample", f"{up}.upsamplers.0.conv"))
    for ours, theirs in parts:
        for i in range(size.resnets + 1):
            pairs += [(f"{ours}_resnet_{i}/{a}", f"{theirs}.resnets.{i}.{b}") for a, b in RESNET]
    return pairs


def to_torch(module, array):
    """A kernel or scale in PyTorch's layout."""
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if array.ndim == 3:  # (in, heads, head size), or for "out" (heads, head size, out)
        merge = module.endswith("out/linear")
        array = array.reshape(-1, array.shape[-1]) if merge else array.reshape(len(array), -1)
    return array.T


def to_diffusers(params, size):
    """Our parameters (or gradients) under diffusers' names and in its layouts."""
    ours = {name: np.asarray(a) for name, a in flatten_dict(params, sep="/").items()}
    out, moved = {}, set()
    for module, theirs in table(size):
        for leaf in ("kernel", "scale", "bias"):
            name = f"{module}/{leaf}"
            if name not in ours:
                continue
            if leaf == "bias":
                out[f"{theirs}.bias"] = ours[name].reshape(-1)
            else:
                out[f"{theirs}.weight"] = to_torch(module, ours[name])
            moved.add(name)
    assert moved == set(ours), f"not in the table: {set(ours) - moved}"
    return out


def diffusers_kl(size):
    """diffusers' autoencoder of this size."""
    levels = len(size.channels)
    return DiffusersKL(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=size.channels,
        layers_per_block=size.resnets,
        latent_channels=size.latent,
        norm_num_groups=size.groups,
    )


def loaded(params, size=SMALL):
    """diffusers' autoencoder with our parameters; none of its own is left."""
    model = diffusers_kl(size)
    state = {name: torch.tensor(a.copy()) for name, a in to_diffusers(params, size).items()}
    model.load_state_dict(state)
    return model


def nchw(x):
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1).detach().numpy()


def relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("height, width", [(8, 8), (12, 16)])
def test_agrees_with_diffusers(height, width):
    model, params = build()
    # Small features show the epsilons of the norms that read them.
    params = jax.tree.map(lambda a: 0.05 * a if a.ndim == 4 else a, params)
    theirs, x = loaded(params), pictures(height, width)
    moments = run(model, "encode", params, x)
    assert moments.shape == (2, height // 2, width // 2, 6)
    assert relative(moments, nhwc(theirs.encode(nchw(x)).latent_dist.parameters)) < 1e-5
    latents = pictures(height // 2, width // 2, seed=1, channels=3)
    images = run(model, "decode", params, latents)
    assert images.shape == x.shape
    assert relative(images, nhwc(theirs.decode(nchw(latents)).sample)) < 1e-5


def test_gradients_agree_with_diffusers():
    model, params = build()
    theirs, x = loaded(params), pictures(8, 8)

    def loss(params):
        return ((model.apply({"params": params}, x) - x) ** 2).mean()

    grads = jit(jax.grad(loss))(params)
    target = nchw(x)
    decoded = theirs.decode(theirs.encode(target).latent_dist.mode()).sample
    ((decoded - target) ** 2).mean().backward()
    expected = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    largest = max(np.abs(g).max() for g in expected.values())
    for name, gradient in to_diffusers(grads, SMALL).items():
        # Biases of keys have no gradient but rounding errors, nor have unused log-variances.
        bound = max(np.abs(expected[name]).max(), 1e-4 * largest)
        assert np.abs(gradient - expected[name]).max() < 1e-3 * bound, name


def test_mean_and_std_agree_with_diffusers():
    moments = 60 * pictures(4, 4, channels=6)  # log-variances beyond both ends
    theirs = DiagonalGaussianDistribution(nchw(moments))
    mean, std = mean_and_std(jnp.asarray(moments))
    np.testing.assert_array_equal(mean, nhwc(theirs.mean))
    np.testing.assert_allclose(std, nhwc(theirs.std), rtol=1e-6)
    assert std.min() == pytest.approx(np.exp(-15)) and std.max() == pytest.approx(np.exp(10))


def test_call_decodes_the_mean():
    model, params = build()
    x = pictures(8, 8)
    mean, _ = mean_and_std(run(model, "encode", params, x))
    expected = run(model, "decode", params, mean)
    np.testing.assert_allclose(run(model, None, params, x), expected, atol=1e-5)


def test_bf16_is_close_to_f32():
    f32, params = build()
    bf16, other = build(dtype=jnp.bfloat16)
    assert jax.tree.map(lambda a: a.dtype, other) == jax.tree.map(lambda a: a.dtype, params)
    latents = pictures(4, 4, seed=1, channels=3)
    for method, x in (("encode", pictures(8, 8)), ("decode", latents)):
        a, b = (run(model, method, params, x) for model in (f32, bf16))
        assert a.dtype == b.dtype == jnp.float32
        error = np.sqrt(np.mean((a - b) ** 2) / np.mean(a**2))
        assert 1e-4 < error < 0.03  # 8 bits: 0.4% an operation


def test_sd_has_the_size_of_stable_diffusion():
    model = AutoencoderKL(SIZES["sd"])
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    with torch.device("meta"):
        theirs = diffusers_kl(SIZES["sd"])
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count == pytest.approx(83.65e6, rel=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_factor_is_the_reduction_of_sides(name):
    model = AutoencoderKL(SIZES[name])
    side = 4 * model.size.factor
    moments = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, method="encode")[0],
        jax.ShapeDtypeStruct((1, side, 2 * side, 3), jnp.float32),
    )
    assert moments.shape == (1, 4, 8, 2 * model.size.latent)
