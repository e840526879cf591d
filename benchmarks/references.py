"""Reference forward passes in plain PyTorch for originals that no package on PyPI carries.

Written from the papers and from the key names of the published checkpoints: their state dicts are
the published layouts (facebookresearch/DiT; sail-sg/MDT, MDTv2) without learned sigma.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


def modulated_norm(x, shift, scale):
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t[:, None].float() * 10000 ** -(torch.arange(128) / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], 1))


class LabelEmbedder(nn.Module):
    def __init__(self, classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y):
        return self.embedding_table(y)


class PatchEmbed(nn.Module):
    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class RelativePositionBias(nn.Module):
    def __init__(self, side, heads):
        super().__init__()
        self.side = side
        entries = (2 * side - 1) ** 2 + 3
        self.relative_position_bias_table = nn.Parameter(torch.zeros(entries, heads))

    def forward(self):
        side, tokens = self.side, [divmod(i, self.side) for i in range(self.side**2)]
        rows = [
            [(r - s + side - 1) * (2 * side - 1) + (c - d + side - 1) for s, d in tokens]
            for r, c in tokens
        ]
        return self.relative_position_bias_table[torch.tensor(rows)].permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, width, heads, side=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        if side:
            self.rel_pos_bias = RelativePositionBias(side, heads)

    def forward(self, x, kept=None):
        """kept (B, K): indices of these tokens in the grid; None: all in order."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)
        if hasattr(self, "rel_pos_bias"):
            bias = self.rel_pos_bias()
            if kept is not None:
                bias = torch.stack([bias[:, ids][:, :, ids] for ids in kept])
            logits = logits + bias
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, width, heads, side=None, skip=False):
        super().__init__()
        self.attn = Attention(width, heads, side)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(self, x, c, skip=None, kept=None):
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, 1)
        x = x + gate1[:, None] * self.attn(modulated_norm(x, shift1, scale1), kept)
        return x + gate2[:, None] * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, width, patch, channels):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        return self.linear(modulated_norm(x, *self.adaLN_modulation(c).chunk(2, 1)))


class DiT(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) -> eps; positions (N, D) are the fixed sin-cos table."""

    def __init__(self, depth, width, heads, patch, channels, classes, positions):
        super().__init__()
        self.patch, self.positions = patch, positions
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch, channels)

    def forward(self, x, t, y):
        tokens, c = self.x_embedder(x) + self.positions, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c), x.shape)

    def unpatchify(self, tokens, shape):
        b, channels, h, w = shape
        p = self.patch
        tokens = tokens.reshape(b, h // p, w // p, p, p, channels)
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(shape)


class MDTv2(nn.Module):
    """x (B, C, H, W), t (B,), y (B,) -> eps.

    kept (K,): indices of the encoder's tokens, the same for all samples; None: all.
    """

    unpatchify = DiT.unpatchify

    def __init__(self, depth, decoder, width, heads, patch, side, channels, classes):
        super().__init__()
        half = (depth - decoder) // 2
        blocks = lambda n, skip: nn.ModuleList(  # noqa: E731
            Block(width, heads, side, skip) for _ in range(n)
        )
        self.patch = patch
        self.x_embedder = PatchEmbed(channels, width, patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, side**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.en_inblocks, self.en_outblocks = blocks(half, False), blocks(half, True)
        self.de_blocks, self.sideblocks = blocks(decoder, True), blocks(1, False)
        self.final_layer = FinalLayer(width, patch, channels)

    def forward(self, x, t, y, kept=None):
        shape = x.shape
        c = self.t_embedder(t) + self.y_embedder(y)
        start = x = self.x_embedder(x) + self.pos_embed
        if kept is not None:
            x = x[:, kept]
        ids = None if kept is None else kept.expand(len(x), -1)
        skips = []
        for block in self.en_inblocks:
            x = block(x, c, kept=ids)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, skips.pop(), ids)
        if kept is None:
            x = x + self.decoder_pos_embed
        else:
            full = self.mask_token.expand(start.shape).clone()
            full[:, kept] = x
            x = full + self.decoder_pos_embed
            filled = self.sideblocks[0](x, c)
            seen = torch.zeros(start.shape[1], dtype=torch.bool)
            seen[kept] = True
            x = torch.where(seen[:, None], x, filled)
        for block in self.de_blocks:
            x = block(x, c, start)
        return self.unpatchify(self.final_layer(x, c), shape)
