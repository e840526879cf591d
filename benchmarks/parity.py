"""Our architectures against their originals in PyTorch: `python -m benchmarks.parity`.

Both get the same random weights, through the rules that convert checkpoints. Prints the largest
errors, in f32 on the CPU, relative to the largest value: of the output, and over all parameters of
the gradient of a squared loss. Results go to benchmarks/results/parity.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks import references
from condiff_jax.conditioning.cond import Cond, Text
from condiff_jax.models import dit, kl, mdt, mmdit, pixart, unet, unet2d
from condiff_jax.pretrained import key_maps
from condiff_jax.pretrained.layout import to_torch

RESULTS = Path(__file__).parent / "results" / "parity.json"
SIDES = (4, 8)  # of the latents
DEPTH, WIDTH, HEADS, PATCH, CHANNELS, CLASSES = 4, 32, 2, 2, 3, 5
TOKENS, TEXT, POOLED = 5, 12, 10
T = np.array([3, 700], np.int32)
LABELS = jnp.array([1, CLASSES - 1])
# Compilation takes most of the time here, so optimize less.
CHEAP = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
jit = partial(jax.jit, compiler_options=CHEAP)


@dataclasses.dataclass(frozen=True)
class Case:
    """An architecture and its original.

    create(side) -> our model. reference(side) -> the original. call(original, x, t, cond) -> eps as
    (B, C, H, W). inputs: further inputs of both, as {name: array} for ours. cond None: a function
    of x alone.
    """

    name: str
    original: str
    create: Callable[[int], nn.Module]
    cond: Cond | None
    rules: tuple
    reference: Callable[[int], torch.nn.Module]
    call: Callable
    inputs: Callable[[int], dict] = lambda side: {}


def random_like(shapes, seed: int = 0):
    """Random parameters without zeros, also where the initialization is zero (AdaLN-zero)."""
    generator = np.random.default_rng(seed)

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        fan_in = leaf.size // leaf.shape[-1] if path[-1].key == "kernel" else 25
        size = 0.2 if leaf.ndim < 2 else max(0.2, fan_in**-0.5)
        return (center + size * generator.normal(size=leaf.shape)).astype(np.float32)

    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


def noise(side: int, seed: int = 5) -> np.ndarray:
    """Latents (2, side, side, CHANNELS)."""
    shape = (2, side, side, CHANNELS)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def load(module: torch.nn.Module, state: dict, *, tables: tuple[str, ...] = ()) -> torch.nn.Module:
    """Load weights into a module; only `tables`, which are not learned, may be missing."""
    state = {name: torch.tensor(np.array(a)) for name, a in state.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(tables), (missing, unexpected)
    return module.eval()


def compare(case: Case, side: int) -> tuple[float, float]:
    """Relative errors: (of the output, largest of a parameter's gradient)."""
    x, target, inputs = noise(side), noise(side, 6), case.inputs(side)
    model = case.create(side)
    args = (x,) if case.cond is None else (x, T, case.cond)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), *args, **inputs)["params"])

    def loss(params):
        eps = model.apply({"params": params}, *args, **inputs)
        return ((eps - target) ** 2).mean(), eps

    grads, eps = jit(jax.grad(loss, has_aux=True))(params)
    state = key_maps.to_published(to_torch(params), case.rules)
    original = load(case.reference(side), state, tables=("pos_embed.pos_embed",))
    t = torch.tensor(T).long()
    out = case.call(original, torch.tensor(x).permute(0, 3, 1, 2), t, case.cond, **inputs)
    out = out.permute(0, 2, 3, 1)
    ((out - torch.tensor(target)) ** 2).mean().backward()
    out = out.detach().numpy()
    return float(np.abs(eps - out).max() / np.abs(out).max()), gradient_error(case, grads, original)


def gradient_error(case: Case, grads, original: torch.nn.Module) -> float:
    """Largest relative error of a parameter's gradient."""
    ours = key_maps.to_published(to_torch(grads), case.rules)
    gradients = {name: p.grad for name, p in original.named_parameters()}
    assert not any(ours[name].any() for name, grad in gradients.items() if grad is None)  # unused
    expected = {name: grad.numpy() for name, grad in gradients.items() if grad is not None}
    largest = max(np.abs(g).max() for g in expected.values())
    return float(
        max(
            # Without normalization, key biases have gradients of rounding errors only.
            np.abs(ours[name] - g).max() / max(np.abs(g).max(), 1e-4 * largest)
            for name, g in expected.items()
        )
    )


def text() -> Text:
    """Random features of two texts."""
    draw = np.random.default_rng(1).normal
    tokens = jnp.asarray(draw(size=(2, TOKENS, TEXT)), jnp.float32)
    pooled = jnp.asarray(draw(size=(2, POOLED)), jnp.float32)
    return Text(tokens, jnp.ones((2, TOKENS), bool), pooled)


def tensor(a) -> torch.Tensor:
    """A JAX array as a PyTorch tensor."""
    return torch.tensor(np.array(a))


def transformer(module: type, side: int, depth: int = DEPTH, **settings) -> nn.Module:
    """One of our transformers at the size of the comparison."""
    defaults = {"base_grid": side // PATCH, "position": "extrapolate", "classes": None}
    return module(depth, WIDTH, HEADS, PATCH, **(defaults | settings))


def sizes(side: int) -> dict:
    """Arguments of diffusers' transformers for the size of the comparison."""
    return dict(
        sample_size=side,
        patch_size=PATCH,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH,
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH // HEADS,
    )


def facebook_dit(side: int) -> torch.nn.Module:
    """DiT with the fixed positions of our model, which another test checks against diffusers."""
    positions = transformer(dit.DiT, side, classes=CLASSES).positions(noise(side))
    return references.DiT(DEPTH, WIDTH, HEADS, PATCH, CHANNELS, CLASSES, tensor(positions))


def diffusers_dit(side: int) -> torch.nn.Module:
    """DiTTransformer2DModel with DiT's frequencies and one pair of embedders.

    diffusers spaces the frequencies of the timestep as i / 127 instead of DiT's i / 128, and it
    repeats the embedders in every block, whose gradients would have to be summed.
    """
    model = diffusers.DiTTransformer2DModel(
        **sizes(side), num_embeds_ada_norm=CLASSES, norm_eps=1e-6
    )
    for block in model.transformer_blocks:
        block.norm1.emb = model.transformer_blocks[0].norm1.emb
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def diffusers_pixart(side: int) -> torch.nn.Module:
    """PixArtTransformer2DModel for our text features."""
    return diffusers.PixArtTransformer2DModel(
        **sizes(side),
        cross_attention_dim=WIDTH,
        caption_channels=TEXT,
        norm_eps=1e-6,
        use_additional_conditions=False,
        interpolation_scale=1,
    )


def sd3(side: int, qk_norm: str | None) -> torch.nn.Module:
    """SD3Transformer2DModel for our text features."""
    return diffusers.SD3Transformer2DModel(
        **sizes(side),
        joint_attention_dim=TEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=side // PATCH,
        qk_norm=qk_norm,
    )


def mdtv2(side: int) -> torch.nn.Module:
    """MDTv2 with two long skips and four decoder blocks."""
    return references.MDTv2(8, 4, WIDTH, HEADS, PATCH, side // PATCH, CHANNELS, CLASSES)


def hidden(side: int) -> dict:
    """Input that hides half of the tokens from MDTv2's encoder."""
    n = (side // PATCH) ** 2
    order = np.random.default_rng(2).permutation(n)
    return {"hidden": jnp.asarray(np.tile(order >= n // 2, (2, 1)))}


def call_mdtv2(module, x, t, cond, hidden=None):
    """eps of the reference, which takes the indices of the tokens that are not hidden."""
    kept = None if hidden is None else torch.tensor(np.flatnonzero(~np.array(hidden[0])))
    return module(x, t, tensor(cond.semantics).long(), kept)


def call_sd3(module, x, t, cond):
    """eps of SD3Transformer2DModel."""
    return module(x, tensor(cond.semantics.tokens), tensor(cond.semantics.pooled), t).sample


def call_pixart(module, x, t, cond):
    """eps of PixArtTransformer2DModel."""
    none = {"resolution": None, "aspect_ratio": None}
    tokens = tensor(cond.semantics.tokens)
    return module(x, encoder_hidden_states=tokens, timestep=t, added_cond_kwargs=none).sample


def call_class(module, x, t, cond):
    """eps of a class-conditional reference."""
    out = module(x, t, tensor(cond.semantics).long())
    return getattr(out, "sample", out)


# No attention at the deepest or at the first level; heads given by number or by size.
UNETS = {
    "text": unet.Size((16, 32, 48), (True, True, False), TEXT, heads=2, resnets=1),
    "class": unet.Size((16, 32), (False, True), TEXT, head_size=8),
}
UNET2D = unet2d.Size((8, 16, 24), (False, True, False), resnets=1, groups=4)
KL = kl.Size((8, 16), latent=3)


def diffusers_unet(side: int, size: unet.Size, channels: int = CHANNELS) -> torch.nn.Module:
    """UNet2DConditionModel, whose attention_head_dim is the NUMBER of heads."""
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in size.attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in size.attention[::-1]]
    return diffusers.UNet2DConditionModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=size.channels,
        layers_per_block=size.resnets,
        norm_num_groups=size.groups,
        cross_attention_dim=size.context,
        attention_head_dim=tuple(map(size.heads_at, size.channels)),
        down_block_types=down,
        up_block_types=up,
    )


class ClassUNet(torch.nn.Module):
    """UNet2DConditionModel that attends to one class token."""

    def __init__(self, side: int, size=UNETS["class"], channels=CHANNELS, classes=CLASSES):
        super().__init__()
        self.unet = diffusers_unet(side, size, channels)
        self.class_embed = torch.nn.Embedding(classes + 1, size.context)

    def forward(self, x, t, y):
        return self.unet(x, t, self.class_embed(y)[:, None])


CLASS_UNET = (
    *(dataclasses.replace(rule, published=f"unet.{rule.published}") for rule in key_maps.UNET),
    key_maps.Rule("class_embed", "class_embed"),
)


def diffusers_unet2d(side: int, size: unet2d.Size = UNET2D, classes: int = CLASSES):
    """UNet2DModel configured as google/ddpm-cifar10-32; with classes and a null class, or none."""
    down = ["AttnDownBlock2D" if a else "DownBlock2D" for a in size.attention]
    up = ["AttnUpBlock2D" if a else "UpBlock2D" for a in size.attention[::-1]]
    return diffusers.UNet2DModel(
        sample_size=side,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=size.channels,
        layers_per_block=size.resnets,
        down_block_types=down,
        up_block_types=up,
        norm_num_groups=size.groups,
        num_class_embeds=classes + 1 if classes else None,
        freq_shift=1,
        flip_sin_to_cos=False,
        norm_eps=1e-6,
        downsample_padding=0,
        attention_head_dim=None,
    )


def diffusers_kl(side: int, size: kl.Size = KL) -> torch.nn.Module:
    """diffusers' AutoencoderKL."""
    levels = len(size.channels)
    return diffusers.AutoencoderKL(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=size.channels,
        layers_per_block=size.resnets,
        latent_channels=size.latent,
        norm_num_groups=size.groups,
    )


def call_unet(module, x, t, cond):
    """eps of UNet2DConditionModel for text."""
    return module(x, t, tensor(cond.semantics.tokens)).sample


CLASS, TEXT_COND = Cond.of(LABELS), Cond.of(text())
class_dit = partial(transformer, dit.DiT, classes=CLASSES)
class_mdt = partial(transformer, mdt.MDT, classes=CLASSES, depth=8)  # two long skips
mmdit_full = partial(transformer, mmdit.MMDiT, streams="full", pooled=True)
MDTV2 = Case(
    "mdtv2",
    "sail-sg/MDT layout",
    class_mdt,
    CLASS,
    key_maps.mdtv2(PATCH),
    mdtv2,
    call_mdtv2,
)
CASES = (
    Case(
        "unet, text",
        "diffusers UNet2DConditionModel",
        lambda side: unet.UNet(UNETS["text"], qk_norm=False),
        TEXT_COND,
        key_maps.UNET,
        partial(diffusers_unet, size=UNETS["text"]),
        call_unet,
    ),
    Case(
        "unet, classes",
        "diffusers UNet2DConditionModel",
        lambda side: unet.UNet(UNETS["class"], classes=CLASSES, qk_norm=False),
        CLASS,
        CLASS_UNET,
        ClassUNet,
        call_class,
    ),
    Case(
        "unet2d",
        "diffusers UNet2DModel",
        lambda side: unet2d.UNet2D(UNET2D, classes=CLASSES, conditioner="film"),
        CLASS,
        key_maps.UNET2D,
        diffusers_unet2d,
        call_class,
    ),
    Case(
        "autoencoder",
        "diffusers AutoencoderKL",
        lambda side: kl.AutoencoderKL(KL),
        None,
        key_maps.AUTOENCODER,
        diffusers_kl,
        lambda module, x, t, cond: module(x, sample_posterior=False).sample,
    ),
    Case(
        "dit_ln",
        "facebookresearch/DiT layout",
        class_dit,
        CLASS,
        key_maps.facebook_dit(PATCH),
        facebook_dit,
        call_class,
    ),
    Case(
        "dit_ln",
        "diffusers DiTTransformer2DModel",
        class_dit,
        CLASS,
        key_maps.diffusers_dit(PATCH, DEPTH),
        diffusers_dit,
        call_class,
    ),
    Case(
        "pixart",
        "diffusers PixArtTransformer2DModel",
        partial(transformer, pixart.PixArt, qk_norm=False),
        TEXT_COND,
        key_maps.pixart(PATCH),
        diffusers_pixart,
        call_pixart,
    ),
    Case(
        "mmdit full",
        "diffusers SD3Transformer2DModel",
        partial(mmdit_full, qk_norm=False),
        TEXT_COND,
        key_maps.sd3(PATCH, DEPTH),
        partial(sd3, qk_norm=None),
        call_sd3,
    ),
    Case(
        "mmdit full, qk norm",
        "diffusers SD3Transformer2DModel",
        mmdit_full,
        TEXT_COND,
        key_maps.sd3(PATCH, DEPTH),
        partial(sd3, qk_norm="rms_norm"),
        call_sd3,
    ),
    MDTV2,
    dataclasses.replace(MDTV2, name="mdtv2, masked", inputs=hidden),
)


def main() -> None:
    """Print the table and write it to RESULTS."""
    rows = []
    print(f"{'architecture':<22}{'reference':<38}{'output':>10}{'gradient':>10}")
    for case in CASES:
        errors = np.max([compare(case, side) for side in SIDES], axis=0)
        rows.append(
            {
                "architecture": case.name,
                "reference": case.original,
                "output": float(errors[0]),
                "gradient": float(errors[1]),
            }
        )
        print(f"{case.name:<22}{case.original:<38}{errors[0]:>10.1e}{errors[1]:>10.1e}")
    versions = {"jax": jax.__version__, "torch": torch.__version__}
    versions["diffusers"] = diffusers.__version__
    record = {"sides": SIDES, "versions": versions, "rows": rows}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
