"""The models of condiff_jax in plain PyTorch; needs only torch, and safetensors for `load`.

It follows "On Improved Conditioning Mechanisms and Pre-training Strategies for Diffusion Models"
(NeurIPS 2024). Denoisers are conditioned on semantics (a class or a text) and on control metadata
(crop, flip, original size). The architectures differ in how these inputs enter the network:

    architecture  class               semantics                        control (Eq. 1)
    ours          MMDiT               joint attention                  AdaLN
    mmdit         MMDiT(pooled=True)  joint attention and AdaLN        AdaLN
    dit_att       DiT(cross=True)     cross-attention                  AdaLN
    dit_ln        DiT                 AdaLN (classes only)             AdaLN
    pixart        PixArt              cross-attention                  AdaLN, shared by all blocks
    mdtv2         MDT                 AdaLN (classes only)             AdaLN
    unet          UNet                cross-attention                  time embedding

Shapes: B batch, C channels, N image tokens, T condition tokens, D width of the model. Computation
is in the dtype of the weights, norms of queries and keys in f32. Modules keep PyTorch's default
initialization, because trained weights are to be loaded into them.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------
# Conditioning inputs of a denoiser


class Text(NamedTuple):
    """Text features: tokens (B, T, C), padded with `pad`, and one vector (B, C) for each text."""

    tokens: Tensor
    pooled: Tensor | None = None  # used by `mmdit` only


class Control(NamedTuple):
    """Control metadata: scalars phi_h (B, high) and phi_l (B, low) of Eq. 1.

    Sizes are in pixels. Fractions, flags and ratios are multiplied by 1000, because sinusoidal
    features resolve differences of about one.
    """

    high: Tensor  # such as crop_top, crop_left, crop_height, crop_width, flip
    low: Tensor  # such as height and width of the original image


class Weighting(NamedTuple):
    """gamma_c(t) of Eq. 1 as a table by timestep, interpolated linearly between timesteps."""

    table: list[float]

    def __call__(self, t: Tensor) -> Tensor:
        table = torch.tensor(self.table, device=t.device)
        t = t.float().clamp(0, len(table) - 1)
        below = t.floor().long()
        above = (below + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[below], table[above], t - below)


def dropped(x: Tensor | None, drop: Tensor | None, null: int = 0) -> Tensor | None:
    """Replace x (B, ...) by `null` where drop (B,) is true."""
    if x is None or drop is None:
        return x
    return torch.where(drop.view(-1, *[1] * (x.ndim - 1)), null, x)


# ---------------------------------------------------------------------------------------------
# Layers


def sinusoid(x: Tensor, size: int) -> Tensor:
    """Sinusoidal features of x (...): (..., size), cosines, then sines; periods up to 10000."""
    frequencies = torch.exp(-math.log(10000) / (size // 2) * torch.arange(size // 2))
    angles = x.float()[..., None] * frequencies.to(x.device)
    return torch.cat([angles.cos(), angles.sin()], -1)


class VectorEmbed(nn.Module):
    """Linear-SiLU-Linear, (B, size) -> (B, width)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(size, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x.to(self.fc1.weight.dtype))))


class ScalarEmbed(VectorEmbed):
    """`VectorEmbed` of the concatenated sinusoids of scalars (B,) or (B, count): (B, width)."""

    def __init__(self, count: int, width: int, sinusoids: int = 256):
        super().__init__(count * sinusoids, width)
        self.sinusoids = sinusoids

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(sinusoid(x, self.sinusoids).flatten(1))


class TimestepEmbed(nn.Module):
    """Embedding of timesteps, (B,) -> (B, width)."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = ScalarEmbed(1, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(t)


class ControlEmbed(nn.Module):
    """Eq. 1: c_emb = E_h(phi_h) + gamma_c(t) E_l(phi_l), (B, width).

    High-level control (composition, such as the crop) is used at every noise level. The weight of
    low-level control (details, such as the original size) grows as the noise decreases.
    """

    def __init__(self, width: int, weighting: list[float] | None, high: int, low: int):
        super().__init__()
        self.weighting = Weighting(weighting or [1.0])
        self.counts = high, low
        self.high = ScalarEmbed(high, width) if high else None
        self.low = ScalarEmbed(low, width) if low else None

    def forward(self, control: Control, t: Tensor) -> Tensor:
        counts = control.high.shape[-1], control.low.shape[-1]
        if counts != self.counts:
            raise ValueError(f"the model takes {self.counts} control scalars, got {counts}")
        c_emb = self.high(control.high) if self.high else 0
        if self.low:
            low = self.low(control.low)
            c_emb = c_emb + self.weighting(t)[:, None].to(low) * low
        return c_emb


class Modulation(nn.Linear):
    """AdaLN projection: `count` vectors (B, 1, D) from the conditioning vector (B, D)."""

    def __init__(self, width: int, count: int):
        super().__init__(width, count * width)
        self.count = count

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return super().forward(F.silu(emb))[:, None].chunk(self.count, -1)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm over channels without scale and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: normalize tokens (B, N, D), then scale and shift them by vectors (B, 1, D)."""
    return layer_norm(x) * (1 + scale) + shift


class Mlp(nn.Module):
    """Linear-GELU-Linear, (B, N, size) -> (B, N, width)."""

    def __init__(self, size: int, hidden: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(size, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RMSNorm(nn.Module):
    """RMSNorm of queries or keys over the head size, in f32.

    Training diverges without it (Sec. 3.1).
    """

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Attention of x (B, N, D) to itself or to a context (B, T, context).

    qk_norm: apply `RMSNorm` to queries and keys. Blocks with image and condition tokens derive from
    this class and `add` a second set of projections.
    """

    def __init__(self, width, heads, qk_norm=False, context=None, bias=True):
        super().__init__()
        self.heads = heads
        self.add("", width, qk_norm, context or width, bias)
        self.out = nn.Linear(width, width)

    def add(self, prefix: str, width: int, qk_norm: bool, context: int, bias: bool = True) -> None:
        """Add projections to queries, keys and values, with names that start with `prefix`."""
        for name, size in (("query", width), ("key", context), ("value", context)):
            self.add_module(prefix + name, nn.Linear(size, width, bias=bias))
        for name in ("query_norm", "key_norm"):
            norm = RMSNorm(width // self.heads) if qk_norm else nn.Identity()
            self.add_module(prefix + name, norm)

    def project(self, x: Tensor, context: Tensor, prefix: str = "") -> tuple[Tensor, ...]:
        """Return queries, keys and values, each (B, heads, N or T, head size)."""

        def heads(name, x):
            return getattr(self, prefix + name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

        q = getattr(self, prefix + "query_norm")(heads("query", x))
        k = getattr(self, prefix + "key_norm")(heads("key", context))
        return q, k, heads("value", context)

    def project_streams(self, streams: dict[str, Tensor]) -> list[Tensor]:
        """Project token streams {prefix: (B, n, D)} and concatenate them along the tokens."""
        parts = [self.project(x, x, prefix) for prefix, x in streams.items()]
        return [torch.cat(part, 2) for part in zip(*parts, strict=True)]

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None):
        """Attend; bias (1, heads, N, T) is added to the logits."""
        q, k, v = self.project(x, x if context is None else context)
        return self.out(attend(q, k, v, bias))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(head size) + bias) v: (B, heads, N, head size) -> (B, N, D)."""
    bias = None if bias is None else bias.to(q.dtype)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return y.transpose(1, 2).flatten(2)


def patchify(x: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p * p * C); patches in row-major order, channels last in a patch."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // patch**2, patch**2 * c)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Inverse of `patchify`: (B, N, p * p * C) -> (B, C, height, width)."""
    x = x.reshape(len(x), height // patch, width // patch, patch, patch, -1)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, height, width)


def position_grid(grid: int, base: int, mode: str) -> Tensor:
    """Coordinates (grid,) of the tokens along one axis, for a model with base grid `base`.

    resample: from 0 to base at every resolution (pseudocode 1), so that weights transfer between
    resolutions. extrapolate: 0, 1, 2, ..., the baseline of Fig. 8a.
    """
    if mode == "resample":
        return torch.linspace(0, base, grid, dtype=torch.float64)
    if mode == "extrapolate":
        return torch.arange(grid, dtype=torch.float64)
    raise ValueError(f"unknown position embedding {mode!r}, choose resample or extrapolate")


def position_embedding(width: int, rows: Tensor, columns: Tensor) -> Tensor:
    """2-D sin-cos embedding (rows * columns, width): half for the column, half for the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    angles = [position.flatten()[:, None] * frequencies for position in (columns, rows)]
    return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)


# ---------------------------------------------------------------------------------------------
# Denoisers


class Denoiser(nn.Module):
    """Base class of denoisers: model(x (B, C, H, W), t (B,), semantics) -> eps, shaped like x.

    t: timestep index, 0 for the least noise. semantics: class labels (B,) or a `Text`. control: a
    `Control`, or None. drop_semantics, drop_control (B,) bool: where true, the input is replaced by
    the null condition (the empty sets of Eq. 2). Weights trained to predict v return v.

    Arguments of all denoisers: channels: C. classes: number of classes, or None for text, whose
    features have text_width channels. weighting: the table of `Weighting`. high, low: number of
    scalars in each part of `Control`.
    """

    def __init__(self, timestep, width, context, classes, weighting, high, low):
        """Create the modules; timestep embeds t as (B, width), context: class embedding width."""
        super().__init__()
        self.classes, self.timestep = classes, timestep
        self.control = ControlEmbed(width, weighting, high, low)
        if classes is not None:  # the last row is the null class
            self.class_embed = nn.Embedding(classes + 1, context)

    def forward(self, x, t, semantics, control=None, drop_semantics=None, drop_control=None):
        if self.classes is None:
            semantics = Text(*(dropped(features, drop_semantics) for features in semantics))
        else:
            semantics = dropped(semantics, drop_semantics, null=self.classes)
        emb = self.timestep(t)
        if control is not None:
            emb = emb + dropped(self.control(control, t), drop_control)
        return self.denoise(x, emb, semantics)


class Transformer(Denoiser):
    """Base class of diffusion transformers: patch embedding, positions and final layer.

    patch: side of a patch. base_grid: tokens per side at the base resolution, see `position_grid`.
    qk_norm: normalize queries and keys of attention over condition tokens.
    """

    def __init__(
        self, *, depth: int, width: int, heads: int, patch: int, base_grid: int, channels: int,
        classes: int | None = None, text_width: int | None = None, qk_norm: bool = True,
        position: str = "resample", weighting: list[float] | None = None, high: int = 0,
        low: int = 0,
    ):  # fmt: skip
        super().__init__(TimestepEmbed(width), width, width, classes, weighting, high, low)
        self.depth, self.width, self.heads, self.qk_norm = depth, width, heads, qk_norm
        self.patch, self.base_grid, self.position = patch, base_grid, position
        self.patch_embed = nn.Linear(patch**2 * channels, width)
        if classes is None:
            self.caption = Mlp(text_width, width, width)
        self.final_modulation = Modulation(width, 2)
        self.final = nn.Linear(width, patch**2 * channels)

    def denoise(self, x: Tensor, emb: Tensor, semantics: Tensor | Text) -> Tensor:
        height, width = x.shape[2:]
        positions = self.embed_positions(height // self.patch, width // self.patch)
        tokens = self.patch_embed(patchify(x, self.patch)) + positions.to(x)  # (B, N, D)
        tokens, emb = self.transform(tokens, emb, semantics)
        tokens = modulated_norm(tokens, *self.final_modulation(emb))
        return unpatchify(self.final(tokens), self.patch, height, width)

    def embed_positions(self, rows: int, columns: int) -> Tensor:
        """Position embedding (N, D) of the tokens."""
        axes = (position_grid(n, self.base_grid, self.position) for n in (rows, columns))
        return position_embedding(self.width, *axes)

    def condition_tokens(self, semantics: Tensor | Text) -> Tensor:
        """The class as one token, or the text tokens: (B, T, D)."""
        if self.classes is None:
            return self.caption(semantics.tokens)
        return self.class_embed(semantics)[:, None]

    def stack(self, block: type[nn.Module], *args, depth: int | None = None, **settings):
        """A list of `depth` blocks, by default as many as the model is deep."""
        count = self.depth if depth is None else depth
        return nn.ModuleList(block(self.width, self.heads, *args, **settings) for _ in range(count))


class DiTBlock(nn.Module):
    """Self-attention, optional cross-attention to a context (B, T, D), and an MLP; x is (B, N, D).

    AdaLN: the vector emb (B, D) shifts and scales the inputs of self-attention and MLP, and gates
    their outputs. bias: see `Attention`.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool = False, cross: bool = False):
        super().__init__()
        self.modulation = Modulation(width, 6)
        self.attention = Attention(width, heads)
        self.cross = Attention(width, heads, qk_norm) if cross else None
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, x, emb, context=None, bias=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        x = x + gate1 * self.attention(modulated_norm(x, shift1, scale1), bias=bias)
        if context is not None:
            x = x + self.cross(self.cross_norm(x), context)
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))

    def cross_norm(self, x: Tensor) -> Tensor:
        """Normalize the input of cross-attention."""
        return layer_norm(x)


class DiT(Transformer):
    """DiT (arXiv:2212.09748); cross: semantics enter by cross-attention instead of AdaLN."""

    def __init__(self, *, cross: bool = False, **common):
        super().__init__(**common)
        self.cross = cross
        self.blocks = self.stack(DiTBlock, self.qk_norm, cross)

    def transform(self, x, emb, semantics):
        """Tokens (B, N, D) after all blocks, and the input of the final modulation."""
        context = None
        if self.cross:
            context = self.condition_tokens(semantics)
        else:
            emb = emb + self.class_embed(semantics)
        for block in self.blocks:
            x = block(x, emb, context)
        return x, emb


class Table(nn.Module):
    """AdaLN-single: the sums of learned vectors (count, D) and shared ones, (B, 1, D) each."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(count, width) / width**0.5)

    def forward(self, shared: Tensor) -> tuple[Tensor, ...]:
        return (self.table + shared).split(1, 1)


class PixArtBlock(DiTBlock):
    """A PixArt block; emb (B, 6, D) is the modulation that all blocks share."""

    def __init__(self, width: int, heads: int, qk_norm: bool):
        super().__init__(width, heads, qk_norm, cross=True)
        self.modulation = Table(width, 6)

    def cross_norm(self, x: Tensor) -> Tensor:
        return x  # the published model has no norm here


class PixArt(Transformer):
    """PixArt-alpha (arXiv:2310.00426): cross-attention, and one AdaLN projection for all blocks."""

    def __init__(self, **common):
        super().__init__(**common)
        self.shared_modulation = Modulation(self.width, 6)
        self.blocks = self.stack(PixArtBlock, self.qk_norm)
        self.final_modulation = Table(self.width, 2)

    def transform(self, x, emb, semantics):
        context = self.condition_tokens(semantics)
        modulation = torch.cat(self.shared_modulation(emb), 1)  # (B, 6, D)
        for block in self.blocks:
            x = block(x, modulation, context)
        return x, emb[:, None]


class MDTBlock(DiTBlock):
    """A DiT block with a relative position bias and, for merge, a skip input."""

    def __init__(self, width: int, heads: int, entries: int, merge: bool = False):
        super().__init__(width, heads)
        self.skip = nn.Linear(2 * width, width) if merge else None
        self.relative_bias = nn.Parameter(torch.zeros(entries, heads))

    def forward(self, x, emb, index, skip=None):
        """Apply the block; index (N, N): bias row of each pair of tokens; skip (B, N, D)."""
        if skip is not None:
            x = self.skip(torch.cat([x, skip], -1))
        return super().forward(x, emb, bias=self.relative_bias[index].permute(2, 0, 1)[None])


class MDT(Transformer):
    """MDTv2 (arXiv:2303.14389) for sampling; depth counts encoder and decoder blocks.

    Long skips join the encoder's halves, and every decoder block takes the encoder's input as a
    skip. The mask token and the side block are for masked training only. grid: tokens per side; the
    learned positions fix the resolution.
    """

    def __init__(self, *, grid: int, **common):
        super().__init__(**common)
        decoder = min(4, self.depth // 2)
        half = max(1, (self.depth - decoder) // 2)
        entries = (2 * grid - 1) ** 2 + 3  # the last three are unused, as in the published model
        self.grid = grid
        self.positions = nn.Parameter(torch.zeros(grid**2, self.width))
        self.decoder_positions = nn.Parameter(torch.zeros(grid**2, self.width))
        self.mask_token = nn.Parameter(torch.zeros(self.width))
        self.in_blocks = self.stack(MDTBlock, entries, depth=half)
        self.out_blocks = self.stack(MDTBlock, entries, merge=True, depth=half)
        self.side_block = MDTBlock(self.width, self.heads, entries)
        self.decoder_blocks = self.stack(MDTBlock, entries, merge=True, depth=decoder)

    def embed_positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) != (self.grid, self.grid):
            raise ValueError(f"the model takes {self.grid} tokens a side, got {rows} x {columns}")
        return self.positions

    def relative_index(self) -> Tensor:
        """Row of the bias table for each pair of tokens, (N, N)."""
        side = torch.arange(self.grid, device=self.positions.device)
        row, column = side.repeat_interleave(self.grid), side.repeat(self.grid)
        down = row[:, None] - row + self.grid - 1
        right = column[:, None] - column + self.grid - 1
        return down * (2 * self.grid - 1) + right

    def transform(self, x, emb, semantics):
        emb, index = emb + self.class_embed(semantics), self.relative_index()
        start, skips = x, []
        for block in self.in_blocks:
            x = block(x, emb, index)
            skips.append(x)
        for block in self.out_blocks:
            x = block(x, emb, index, skips.pop())
        x = x + self.decoder_positions
        for block in self.decoder_blocks:
            x = block(x, emb, index, start)
        return x, emb


class JointBlock(Attention):
    """A DiT block over z (B, N + T, D): N image tokens, then T condition tokens.

    Both kinds of tokens share all weights; with separate_qkv, condition tokens have their own
    projections to queries, keys and values.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, separate_qkv: bool):
        super().__init__(width, heads, qk_norm)
        self.separate_qkv = separate_qkv
        if separate_qkv:
            self.add("context_", width, qk_norm, width, bias=False)
        self.modulation = Modulation(width, 6)
        self.mlp = Mlp(width, 4 * width, width)

    def forward(self, z, emb, n):
        """Apply the block; n: number of image tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        y = modulated_norm(z, shift1, scale1)
        streams = {"": y[:, :n], "context_": y[:, n:]} if self.separate_qkv else {"": y}
        z = z + gate1 * self.out(attend(*self.project_streams(streams)))
        return z + gate2 * self.mlp(modulated_norm(z, shift2, scale2))


class TwoStreamBlock(Attention):
    """An SD3 block: image x (B, N, D) and context c (B, T, D) share attention and nothing else.

    last: the context is not used afterwards, so that only x is updated.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, last: bool = False):
        super().__init__(width, heads, qk_norm)
        self.add("context_", width, qk_norm, width)
        self.modulation = Modulation(width, 6)
        self.mlp = Mlp(width, 4 * width, width)
        self.last = last
        self.context_modulation = Modulation(width, 2 if last else 6)
        if not last:
            self.context_out = nn.Linear(width, width)
            self.context_mlp = Mlp(width, 4 * width, width)

    def forward(self, x, c, emb):
        shift1, scale1, *mod_x = self.modulation(emb)
        shift2, scale2, *mod_c = self.context_modulation(emb)
        streams = {
            "": modulated_norm(x, shift1, scale1),
            "context_": modulated_norm(c, shift2, scale2),
        }
        y = attend(*self.project_streams(streams))
        n = x.shape[1]
        x = self.update(x, y[:, :n], self.out, self.mlp, *mod_x)
        if not self.last:
            c = self.update(c, y[:, n:], self.context_out, self.context_mlp, *mod_c)
        return x, c

    def update(self, x, attended, out, mlp, gate1, shift, scale, gate2):
        """Add the gated outputs of attention and MLP to one stream."""
        x = x + gate1 * out(attended)
        return x + gate2 * mlp(modulated_norm(x, shift, scale))


class MMDiT(Transformer):
    """Joint attention over image and condition tokens: SD3's mmDiT, and the paper's model.

    streams: the weights that condition tokens do not share with image tokens: none (shared),
    projections to queries, keys and values (qkv), or all (full, as in SD3). pooled: the pooled text
    (of pooled_width) or the class is an input of AdaLN too. In the paper's model, AdaLN takes
    timestep and control only.
    """

    def __init__(
        self, *, streams: str = "qkv", pooled: bool = False, pooled_width: int | None = None,
        **common,
    ):  # fmt: skip
        super().__init__(**common)
        if streams not in ("shared", "qkv", "full"):
            raise ValueError(f"unknown streams {streams!r}, choose shared, qkv or full")
        self.full = streams == "full"
        self.uses_pooled = pooled
        self.pooled = None
        if not self.full:
            self.blocks = self.stack(JointBlock, self.qk_norm, streams == "qkv")
            return
        self.blocks = self.stack(TwoStreamBlock, self.qk_norm, depth=self.depth - 1)
        self.last_block = TwoStreamBlock(self.width, self.heads, self.qk_norm, last=True)
        if self.classes is None:
            self.caption = nn.Linear(common["text_width"], self.width)
            self.pooled = VectorEmbed(pooled_width, self.width) if pooled else None

    def transform(self, x, emb, semantics):
        context = self.condition_tokens(semantics)  # (B, T, D)
        if self.uses_pooled:
            emb = emb + self.embed_pooled(semantics)
        if self.full:
            for block in [*self.blocks, self.last_block]:
                x, context = block(x, context, emb)
            return x, emb
        n = x.shape[1]
        z = torch.cat([x, context], 1)
        for block in self.blocks:
            z = block(z, emb, n)
        return z[:, :n], emb

    def embed_pooled(self, semantics: Tensor | Text) -> Tensor:
        """The class or the pooled text as a vector (B, D)."""
        if self.classes is not None:
            return self.class_embed(semantics)
        return (self.pooled or self.caption)(semantics.pooled)


# ---------------------------------------------------------------------------------------------
# Convolutional networks: the UNet and the autoencoder


class Size(NamedTuple):
    """Width of each level, and ResNet blocks a level, of a UNet or an autoencoder.

    UNet: attention: whether each level has attention; heads or head_size: the number or the size of
    its heads; context: width of the class embedding. Autoencoder: latent: channels of the latents;
    codes: codebook size, unused by AutoencoderKL.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...] = ()
    context: int | None = None
    heads: int | None = None
    head_size: int | None = None
    resnets: int = 2
    latent: int = 4
    codes: int = 0

    @property
    def groups(self) -> int:
        """Groups of each GroupNorm: 32, or fewer so that each has at least 4 channels."""
        return min(32, self.channels[0] // 4)


def conv3(size: int, width: int) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps height and width."""
    return nn.Conv2d(size, width, 3, padding=1)


class Downsample(nn.Conv2d):
    """Convolution that halves height and width; before: padding at top and left, in pixels."""

    def __init__(self, width: int, before: int):
        super().__init__(width, width, 3, stride=2)
        self.before = before

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.before, 1, self.before, 1)))


class Upsample(nn.Conv2d):
    """Double height and width by nearest-neighbor interpolation, then convolve."""

    def __init__(self, width: int):
        super().__init__(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2))


class ResNetBlock(nn.Module):
    """ResNet block, (B, size, H, W) -> (B, width, H, W); time: width of emb (B, time), or None."""

    def __init__(self, size: int, width: int, groups: int, time: int | None = None, eps=1e-5):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, size, eps)
        self.conv1 = conv3(size, width)
        self.time = nn.Linear(time, width) if time else None
        self.norm2 = nn.GroupNorm(groups, width, eps)
        self.conv2 = conv3(width, width)
        self.shortcut = nn.Conv2d(size, width, 1) if size != width else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        if emb is not None:
            y = y + self.time(F.silu(emb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class GatedMlp(nn.Module):
    """Linear-GEGLU-Linear, (B, N, D) -> (B, N, D)."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 8 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(y * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to a context (B, T, C) and MLP on pixels (B, D, H, W)."""

    def __init__(self, width: int, heads: int, groups: int, qk_norm: bool, context: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, 1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.self_norm, self.cross_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = Attention(width, heads, bias=False)
        self.cross_attention = Attention(width, heads, qk_norm, context, bias=False)
        self.mlp = GatedMlp(width)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        z = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, D)
        z = z + self.self_attention(self.self_norm(z))
        z = z + self.cross_attention(self.cross_norm(z), context)
        z = z + self.mlp(self.mlp_norm(z))
        return x + self.proj_out(z.transpose(1, 2).reshape(x.shape))


class UNet(Denoiser):
    """The UNet of LDM and Stable Diffusion.

    Semantics enter by cross-attention; timestep and control enter in each ResNet block. Levels are
    down_0, down_1, ... to the deepest, and up_0 (the deepest), up_1, ... back. The context is
    a class embedding of width size.context, or text of text_width.
    """

    def __init__(
        self, *, size: Size, channels: int, classes: int | None = None,
        text_width: int | None = None, qk_norm: bool = True, weighting: list[float] | None = None,
        high: int = 0, low: int = 0,
    ):  # fmt: skip
        first, deepest = size.channels[0], size.channels[-1]
        timestep = ScalarEmbed(1, 4 * first, sinusoids=first)
        super().__init__(timestep, 4 * first, size.context, classes, weighting, high, low)
        self.size, self.qk_norm = size, qk_norm
        self.context = text_width if classes is None else size.context
        self.conv_in = conv3(channels, first)
        levels = list(zip(size.channels, size.attention, strict=True))
        width_in = first
        skips = [first]
        for level, (width, attend) in enumerate(levels):
            for index in range(size.resnets):
                self.add_stage(f"down_{level}", index, width_in, width, attend)
                width_in = width
                skips.append(width)
            if level < len(levels) - 1:
                self.add_module(f"down_{level}_downsample", Downsample(width_in, before=1))
                skips.append(width_in)
        self.add_stage("mid", 0, deepest, deepest, True)
        self.add_stage("mid", 1, deepest, deepest, False)
        for level, (width, attend) in enumerate(levels[::-1]):
            for index in range(size.resnets + 1):
                self.add_stage(f"up_{level}", index, width_in + skips.pop(), width, attend)
                width_in = width
            if level < len(levels) - 1:
                self.add_module(f"up_{level}_upsample", Upsample(width_in))
        self.norm_out = nn.GroupNorm(size.groups, first)
        self.conv_out = conv3(first, channels)

    def add_stage(self, part: str, index: int, size_in: int, width: int, attend: bool) -> None:
        """Add a ResNet block and, for attend, a transformer block."""
        groups, heads = self.size.groups, self.size.heads or width // self.size.head_size
        resnet = ResNetBlock(size_in, width, groups, 4 * self.size.channels[0])
        self.add_module(f"{part}_resnet_{index}", resnet)
        if attend:
            block = TransformerBlock(width, heads, groups, self.qk_norm, self.context)
            self.add_module(f"{part}_attention_{index}", block)

    def stage(self, part: str, index: int, y: Tensor, emb: Tensor, context: Tensor) -> Tensor:
        """Apply the blocks of `add_stage` to y (B, C, H, W)."""
        y = getattr(self, f"{part}_resnet_{index}")(y, emb)
        attention = getattr(self, f"{part}_attention_{index}", None)
        return y if attention is None else attention(y, context)

    def denoise(self, x: Tensor, emb: Tensor, semantics: Tensor | Text) -> Tensor:
        text = self.classes is None
        context = semantics.tokens if text else self.class_embed(semantics)[:, None]  # (B, T, C)
        levels = len(self.size.channels)
        y = self.conv_in(x)
        skips = [y]
        for level in range(levels):
            for index in range(self.size.resnets):
                y = self.stage(f"down_{level}", index, y, emb, context)
                skips.append(y)
            if level < levels - 1:
                y = getattr(self, f"down_{level}_downsample")(y)
                skips.append(y)
        for index in (0, 1):
            y = self.stage("mid", index, y, emb, context)
        for level in range(levels):
            for index in range(self.size.resnets + 1):
                y = self.stage(f"up_{level}", index, torch.cat([y, skips.pop()], 1), emb, context)
            if level < levels - 1:
                y = getattr(self, f"up_{level}_upsample")(y)
        return self.conv_out(F.silu(self.norm_out(y)))


class PixelAttention(Attention):
    """Single-head attention over the pixels of x (B, C, H, W)."""

    def __init__(self, width: int, groups: int):
        super().__init__(width, heads=1)
        self.norm = nn.GroupNorm(groups, width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        return x + super().forward(y).transpose(1, 2).reshape(x.shape)


class AutoencoderKL(nn.Module):
    """Stable Diffusion's autoencoder: images (B, 3, H, W) in [-1, 1], latents (B, C, h, w).

    Diffusion runs on (latents - shift) * scale; scale and shift are not part of this module.
    """

    def __init__(self, *, size: Size):
        super().__init__()
        self.encoder, self.decoder = encoder(size), decoder(size)
        self.quant_conv = nn.Conv2d(2 * size.latent, 2 * size.latent, 1)
        self.post_quant_conv = nn.Conv2d(size.latent, size.latent, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Decode the mean latents of images."""
        return self.decode(mean_and_std(self.encode(images))[0])

    def encode(self, images: Tensor) -> Tensor:
        """Return moments (B, 2 C, h, w) of the latents, see `mean_and_std`."""
        return self.quant_conv(self.encoder(images))

    def decode(self, latents: Tensor) -> Tensor:
        """Return images, near [-1, 1] but not clipped."""
        return self.decoder(self.post_quant_conv(latents))


def mean_and_std(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, each (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, 1)
    return mean, (log_variance.clip(-30, 20) / 2).exp()


def encoder(size: Size) -> nn.Sequential:
    """The encoder, images (B, 3, H, W) -> (B, 2 * latent, h, w)."""
    width_in = size.channels[0]
    layers = {"conv_in": conv3(3, width_in)}
    for level, width in enumerate(size.channels):
        for index in range(size.resnets):
            layers[f"down_{level}_resnet_{index}"] = plain_resnet(size, width_in, width)
            width_in = width
        if level < len(size.channels) - 1:
            layers[f"down_{level}_downsample"] = Downsample(width_in, before=0)
    return nn.Sequential(OrderedDict(layers | mid(size) | head(size, width_in, 2 * size.latent)))


def decoder(size: Size) -> nn.Sequential:
    """The decoder, (B, latent, h, w) -> images (B, 3, H, W); up_0 is the deepest level."""
    width_in = size.channels[-1]
    layers = {"conv_in": conv3(size.latent, width_in)} | mid(size)
    for level, width in enumerate(size.channels[::-1]):
        for index in range(size.resnets + 1):
            layers[f"up_{level}_resnet_{index}"] = plain_resnet(size, width_in, width)
            width_in = width
        if level < len(size.channels) - 1:
            layers[f"up_{level}_upsample"] = Upsample(width_in)
    return nn.Sequential(OrderedDict(layers | head(size, width_in, 3)))


def plain_resnet(size: Size, size_in: int, width: int) -> ResNetBlock:
    """A ResNet block without conditioning."""
    return ResNetBlock(size_in, width, size.groups, eps=1e-6)


def mid(size: Size) -> dict[str, nn.Module]:
    """The deepest blocks of encoder and decoder."""
    width = size.channels[-1]
    return {
        "mid_resnet_0": plain_resnet(size, width, width),
        "mid_attention": PixelAttention(width, size.groups),
        "mid_resnet_1": plain_resnet(size, width, width),
    }


def head(size: Size, width: int, channels: int) -> dict[str, nn.Module]:
    """The last layers of encoder and decoder."""
    norm = nn.GroupNorm(size.groups, width, 1e-6)
    return {"norm_out": norm, "silu": nn.SiLU(), "conv_out": conv3(width, channels)}


# ---------------------------------------------------------------------------------------------
# Text


def tokenize(words: list[str], captions: list[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, length): the words of each caption, cut to length - 1, and an end token.

    words: the vocabulary in order of ids; the first two are the end token and the unknown word.
    """
    vocabulary = {word: i for i, word in enumerate(words)}
    rows = []
    for caption in captions:
        caption_words = re.findall(r"[a-z0-9']+", caption.lower())[: length - 1]
        rows.append([*(vocabulary.get(word, 1) for word in caption_words), 0])
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


class WordEmbedding(nn.Module):
    """Sum of word and position embeddings: ids, mask (B, length) -> `Text`, pooled by the mean."""

    def __init__(self, *, vocabulary: int, width: int, length: int):
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.2 * torch.randn(length, width))

    def forward(self, ids: Tensor, mask: Tensor) -> Text:
        tokens = self.words(ids) + self.positions
        weights = mask / mask.sum(1, keepdim=True).clip(1)
        return Text(tokens, (tokens * weights[..., None].to(tokens)).sum(1))


def pad(
    tokens: Tensor, mask: Tensor, method: str, beta: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    """Fill the positions of tokens (B, T, C) outside the mask (B, T) (Sec. 2.1, Table 3)."""
    if method not in PADDINGS:
        raise ValueError(f"unknown padding {method!r}, choose from {', '.join(PADDINGS)}")
    return PADDINGS[method](tokens, mask, beta, noise)


def zero(tokens: Tensor, mask: Tensor, beta: float, noise: Tensor | None) -> Tensor:
    """Pad with zeros."""
    return torch.where(mask[..., None], tokens, 0)


def replicate(tokens: Tensor, mask: Tensor, beta: float, noise: Tensor | None) -> Tensor:
    """Repeat the n tokens of the prompt cyclically to T."""
    n = mask.sum(1, keepdim=True).clip(1)  # (B, 1)
    source = torch.arange(mask.shape[1], device=mask.device) % n  # (B, T)
    return zero(tokens, mask, beta, noise).gather(1, source[..., None].expand_as(tokens))


def noisy_replicate(tokens: Tensor, mask: Tensor, beta: float, noise: Tensor) -> Tensor:
    """Add scaled standard normal noise (B, T, C) to `replicate` (Eq. 7).

    The scale is sqrt(beta (m - 1)) times the standard deviation of each channel over the prompt's
    n tokens; m = ceil(T / n).
    """
    inside, n = mask[..., None], mask.sum(1, keepdim=True).clip(1)[..., None]  # (B, 1, 1)
    values = torch.where(inside, tokens, 0).float()  # squares in half precision would overflow
    mean = values.sum(1, keepdim=True) / n  # (B, 1, C)
    variance = torch.where(inside, (values - mean) ** 2, 0).sum(1, keepdim=True) / n
    scale = (beta * (-(-mask.shape[1] // n) - 1) * variance).sqrt()
    return replicate(tokens, mask, beta, noise) + scale.to(tokens) * noise.to(tokens)


PADDINGS = {"zero": zero, "replicate": replicate, "noisy_replicate": noisy_replicate}


# ---------------------------------------------------------------------------------------------
# Exported folders

ARCHITECTURES = {
    "ours": MMDiT,
    "mmdit": partial(MMDiT, pooled=True),
    "dit_att": partial(DiT, cross=True),
    "dit_ln": DiT,
    "pixart": PixArt,
    "mdtv2": MDT,
    "unet": UNet,
    "words": WordEmbedding,
    "kl": AutoencoderKL,
}
RECORDS = {"size": Size}  # arguments that JSON stores as an object


def create(config: dict) -> nn.Module:
    """Create a module from {"architecture": a key of ARCHITECTURES, ... its arguments}."""
    settings = dict(config)
    name = settings.pop("architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}, choose from {', '.join(ARCHITECTURES)}")
    for key in RECORDS.keys() & settings.keys():
        settings[key] = RECORDS[key](**settings[key])
    return ARCHITECTURES[name](**settings)


class Network(nn.ModuleDict):
    """All modules of an exported folder, and the settings for sampling.

    Modules: "model", the denoiser; "text_encoder" for text models, unless it is CLIP, which is
    loaded from settings["clip"]; "autoencoder" for latent diffusion.
    """

    def __init__(self, config: dict):
        names = ("model", "text_encoder", "autoencoder")
        super().__init__({name: create(config[name]) for name in names if name in config})
        self.settings = config["settings"]

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, torch_dtype: torch.dtype | None = None, **_
    ) -> Network:
        """Call `load` by the interface of diffusers; torch_dtype None: the dtype of the weights."""
        return load(folder).to(dtype=torch_dtype)

    @property
    def device(self) -> torch.device:
        """Device of the weights; diffusers needs it of each component of a pipeline."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of the computation."""
        return next(self.parameters()).dtype

    @property
    def is_text_conditioned(self) -> bool:
        """Whether semantics are text; otherwise they are class labels."""
        return "text_shape" in self.settings

    @property
    def text_shape(self) -> tuple[int, int]:
        """Shape (T, C) of the text features and of the noise of Eq. 7."""
        return tuple(self.settings["text_shape"])

    def embed(self, prompts: list[str], noise: Tensor | None = None) -> Text:
        """Encode prompts; noise (B, T, C) is that of Eq. 7, drawn if None."""
        ids, mask = tokenize(self.settings["words"], prompts, self.text_shape[0])
        ids, mask = ids.to(self.device), mask.to(self.device)
        return self.pad(*self["text_encoder"](ids, mask), mask, noise)

    def pad(
        self, tokens: Tensor, pooled: Tensor, mask: Tensor, noise: Tensor | None = None
    ) -> Text:
        """Pad the tokens as in training; mask (B, T), noise (B, T, C) of Eq. 7, drawn if None."""
        noise = torch.randn_like(tokens) if noise is None else noise
        settings = self.settings
        return Text(pad(tokens, mask, settings["padding"], settings["beta_txt"], noise), pooled)

    def control(self, values: dict[str, float], batch: int = 1, device=None) -> Control | None:
        """Control metadata for `batch` images, from control values by name.

        Values that are left out take their defaults from settings["control"].
        """
        settings = self.settings
        defaults = settings["control"]
        if unknown := set(values) - set(defaults):
            raise ValueError(
                f"unknown control value {min(unknown)!r}, choose from {', '.join(defaults)}"
            )
        if not settings["high"] + settings["low"]:
            return None
        scale = settings["control_scale"]
        scaled = {name: scale[name] * value for name, value in (defaults | values).items()}
        parts = (torch.tensor([[scaled[n] for n in settings[part]]]) for part in ("high", "low"))
        return Control(*(part.float().expand(batch, -1).to(device) for part in parts))

    def decode(self, x: Tensor) -> Tensor:
        """Decode samples x (B, C, H, W) to images (B, 3, H, W), near [-1, 1]."""
        x = x / self.settings["scale"] + self.settings["shift"]
        if "autoencoder" in self:
            return self["autoencoder"].decode(x)
        if x.shape[1] != 3:
            raise ValueError(
                "cannot decode latents: the folder was exported without an autoencoder; pass "
                'output_type="latent" and decode them yourself'
            )
        return x


def load(folder: str | Path) -> Network:
    """Load an exported folder: modules by config.json, weights from model.safetensors."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    with torch.device("meta"):  # skips initialization, as all weights are loaded
        network = Network(config)
    network.load_state_dict(load_file(Path(folder) / "model.safetensors"), assign=True)
    return network.eval()
