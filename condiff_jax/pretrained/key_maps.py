"""Names and layouts of published checkpoints, as rules from our names in PyTorch's layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """How one published tensor holds ours: pack(ours) -> theirs, unpack(theirs, count) -> ours."""

    pack: Callable[[Arrays], np.ndarray] = lambda arrays: arrays[0]
    unpack: Callable[[np.ndarray, int], Arrays] = lambda array, count: [array]


def _swap(array: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(array, 2)[::-1])


SAME = Form()
# Packed queries, keys and values.
PACKED = Form(np.concatenate, np.split)
# (shift, scale) of ours is (scale, shift) of diffusers' AdaLayerNormContinuous.
SWAPPED = Form(lambda arrays: _swap(arrays[0]), lambda array, _: [_swap(array)])
# The same tensor once more: written by `to_published`, ignored by `from_published`.
COPY = Form()
# A leading dimension of 1.
BATCHED = Form(lambda arrays: arrays[0][None], lambda array, _: [array[0]])


def patches(side: int) -> Form:
    """Embedding of patches: our linear layer (D, p p C), their convolution (D, C, p, p)."""

    def pack(arrays):
        (array,) = arrays
        if array.ndim == 1:  # the bias
            return array
        return array.reshape(len(array), side, side, -1).transpose(0, 3, 1, 2)

    def unpack(array, _):
        return [array if array.ndim == 1 else array.transpose(0, 2, 3, 1).reshape(len(array), -1)]

    return Form(pack, unpack)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Modules (or bare parameters) `ours` are held by `theirs`; each "*" stands for an index."""

    ours: str | Sequence[str]
    theirs: str
    form: Form = SAME

    @property
    def names(self) -> Sequence[str]:
        """`ours` as a sequence."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours


def _match(template: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """Indices and leaf (".weight", ".bias" or "") when a name fits a template."""
    pattern = re.escape(template).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"
    match = re.fullmatch(pattern, name)
    return match and (match.groups()[:-1], match.groups()[-1] or "")


def _fill(template: str, indices: tuple[str, ...], leaf: str) -> str:
    for index in indices:
        template = template.replace("*", index, 1)
    return template + leaf


def to_published(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict:
    """Our tensors (PyTorch's layout) under published names; ValueError for those without a rule."""
    out, left = {}, set(tensors)
    for rule in rules:
        for name in tensors:
            found = _match(rule.names[0], name)
            if not found or (name not in left and rule.form is not COPY):
                continue
            ours = [_fill(part, *found) for part in rule.names]
            out[_fill(rule.theirs, *found)] = rule.form.pack([tensors[part] for part in ours])
            left -= set(ours)
    _all_used(left)
    return out


def from_published(state: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict:
    """Inverse of `to_published`; where several rules fit, the first one counts."""
    out, left = {}, set(state)
    for rule in rules:
        for name in state:
            if name not in left or not (found := _match(rule.theirs, name)):
                continue
            ours = [_fill(part, *found) for part in rule.names]
            arrays = rule.form.unpack(np.asarray(state[name]), len(ours))
            if rule.form is not COPY:
                out |= dict(zip(ours, arrays, strict=True))
            left.remove(name)
    _all_used(left)
    return out


def _all_used(left: set[str]) -> None:
    if left:
        more = f" and {len(left) - 10} more" if len(left) > 10 else ""
        raise ValueError(f"no rule for {', '.join(sorted(left)[:10])}{more}")


def _qkv(ours: str) -> tuple[str, ...]:
    return tuple(f"{ours}.{part}" for part in ("query", "key", "value"))


def facebook_dit(patch: int) -> tuple[Rule, ...]:
    """`dit_ln` in the layout of facebookresearch/DiT (its fixed pos_embed left out)."""
    return (
        Rule("patch_embed", "x_embedder.proj", patches(patch)),
        Rule("timestep.mlp.fc1", "t_embedder.mlp.0"),
        Rule("timestep.mlp.fc2", "t_embedder.mlp.2"),
        Rule("class_embed", "y_embedder.embedding_table"),
        *_dit_block("blocks", "blocks"),
        Rule("final_modulation", "final_layer.adaLN_modulation.1"),
        Rule("final", "final_layer.linear"),
    )


def _dit_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}.*.modulation", f"{theirs}.*.adaLN_modulation.1"),
        Rule(_qkv(f"{ours}.*.attention"), f"{theirs}.*.attn.qkv", PACKED),
        Rule(f"{ours}.*.attention.out", f"{theirs}.*.attn.proj"),
        Rule(f"{ours}.*.mlp.fc1", f"{theirs}.*.mlp.fc1"),
        Rule(f"{ours}.*.mlp.fc2", f"{theirs}.*.mlp.fc2"),
    )


def diffusers_dit(patch: int, depth: int) -> tuple[Rule, ...]:
    """`dit_ln` as DiTTransformer2DModel, which has a copy of the embedders in every block."""
    block = "transformer_blocks.*"
    embedders = [
        Rule(ours, f"transformer_blocks.{i}.norm1.emb.{theirs}", SAME if i == 0 else COPY)
        for i in range(depth)
        for ours, theirs in (
            ("timestep.mlp.fc1", "timestep_embedder.linear_1"),
            ("timestep.mlp.fc2", "timestep_embedder.linear_2"),
            ("class_embed", "class_embedder.embedding_table"),
        )
    ]
    return (
        Rule("patch_embed", "pos_embed.proj", patches(patch)),
        *embedders,
        *_diffusers_attention("blocks.*.attention", f"{block}.attn1"),
        Rule("blocks.*.modulation", f"{block}.norm1.linear"),
        *_diffusers_mlp("blocks.*.mlp", f"{block}.ff"),
        Rule("final_modulation", "proj_out_1"),
        Rule("final", "proj_out_2"),
    )


def _diffusers_attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}.query", f"{theirs}.to_q"),
        Rule(f"{ours}.key", f"{theirs}.to_k"),
        Rule(f"{ours}.value", f"{theirs}.to_v"),
        Rule(f"{ours}.out", f"{theirs}.to_out.0"),
    )


def _diffusers_mlp(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}.fc1", f"{theirs}.net.0.proj"), Rule(f"{ours}.fc2", f"{theirs}.net.2"))


def pixart(patch: int) -> tuple[Rule, ...]:
    """`pixart` for text as diffusers' PixArtTransformer2DModel."""
    block = "transformer_blocks.*"
    return (
        Rule("patch_embed", "pos_embed.proj", patches(patch)),
        Rule("timestep.mlp.fc1", "adaln_single.emb.timestep_embedder.linear_1"),
        Rule("timestep.mlp.fc2", "adaln_single.emb.timestep_embedder.linear_2"),
        Rule("shared_modulation", "adaln_single.linear"),
        Rule("caption.fc1", "caption_projection.linear_1"),
        Rule("caption.fc2", "caption_projection.linear_2"),
        Rule("blocks.*.modulation.table", f"{block}.scale_shift_table"),
        *_diffusers_attention("blocks.*.attention", f"{block}.attn1"),
        *_diffusers_attention("blocks.*.cross", f"{block}.attn2"),
        *_diffusers_mlp("blocks.*.mlp", f"{block}.ff"),
        Rule("final_modulation.table", "scale_shift_table"),
        Rule("final", "proj_out"),
    )


def mdtv2(patch: int) -> tuple[Rule, ...]:
    """`mdtv2` in the layout of sail-sg/MDT."""
    groups = {
        "in_blocks.*": "en_inblocks.*",
        "out_blocks.*": "en_outblocks.*",
        "decoder_blocks.*": "de_blocks.*",
        "side_block": "sideblocks.0",
    }
    blocks = [
        Rule(
            tuple(part.replace("blocks.*", ours, 1) for part in rule.names),
            rule.theirs.replace("blocks.*", theirs, 1),
            rule.form,
        )
        for ours, theirs in groups.items()
        for rule in (
            *_dit_block("blocks", "blocks"),
            Rule("blocks.*.skip", "blocks.*.skip_linear"),
            Rule(
                "blocks.*.relative_bias", "blocks.*.attn.rel_pos_bias.relative_position_bias_table"
            ),
        )
    ]
    outside = [rule for rule in facebook_dit(patch) if not rule.names[0].startswith("blocks")]
    return (
        *outside,
        *blocks,
        Rule("positions", "pos_embed", BATCHED),
        Rule("decoder_positions", "decoder_pos_embed", BATCHED),
        Rule("mask_token", "mask_token", Form(lambda a: a[0][None, None], lambda a, _: [a[0, 0]])),
    )


def sd3(patch: int, depth: int) -> tuple[Rule, ...]:
    """`mmdit` for text with full streams as diffusers' SD3Transformer2DModel."""
    last = f"transformer_blocks.{depth - 1}"
    return (
        Rule("patch_embed", "pos_embed.proj", patches(patch)),
        Rule("caption", "context_embedder"),
        Rule("timestep.mlp.fc1", "time_text_embed.timestep_embedder.linear_1"),
        Rule("timestep.mlp.fc2", "time_text_embed.timestep_embedder.linear_2"),
        Rule("pooled.fc1", "time_text_embed.text_embedder.linear_1"),
        Rule("pooled.fc2", "time_text_embed.text_embedder.linear_2"),
        # The context of the last block has a modulation of two parts, like the final layer.
        Rule("last_block.context_modulation", f"{last}.norm1_context.linear", SWAPPED),
        *_sd3_block("last_block", last),
        *_sd3_block("blocks.*", "transformer_blocks.*"),
        Rule("final_modulation", "norm_out.linear", SWAPPED),
        Rule("final", "proj_out"),
    )


def _sd3_block(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}.modulation", f"{theirs}.norm1.linear"),
        Rule(f"{ours}.context_modulation", f"{theirs}.norm1_context.linear"),
        *_diffusers_attention(ours, f"{theirs}.attn"),
        Rule(f"{ours}.context_query", f"{theirs}.attn.add_q_proj"),
        Rule(f"{ours}.context_key", f"{theirs}.attn.add_k_proj"),
        Rule(f"{ours}.context_value", f"{theirs}.attn.add_v_proj"),
        Rule(f"{ours}.context_out", f"{theirs}.attn.to_add_out"),
        Rule(f"{ours}.query_norm", f"{theirs}.attn.norm_q"),
        Rule(f"{ours}.key_norm", f"{theirs}.attn.norm_k"),
        Rule(f"{ours}.context_query_norm", f"{theirs}.attn.norm_added_q"),
        Rule(f"{ours}.context_key_norm", f"{theirs}.attn.norm_added_k"),
        *_diffusers_mlp(f"{ours}.mlp", f"{theirs}.ff"),
        *_diffusers_mlp(f"{ours}.context_mlp", f"{theirs}.ff_context"),
    )


def _resnet(ours: str, theirs: str) -> tuple[Rule, ...]:
    parts = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
    names = ("norm1", "conv1", "time", "norm2", "conv2", "shortcut")
    return tuple(Rule(f"{ours}.{part}", f"{theirs}.{parts.get(part, part)}") for part in names)


def _unet_attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    block = f"{theirs}.transformer_blocks.0"
    return (
        Rule(f"{ours}.norm", f"{theirs}.norm"),
        Rule(f"{ours}.proj_in", f"{theirs}.proj_in"),
        Rule(f"{ours}.self_norm", f"{block}.norm1"),
        *_diffusers_attention(f"{ours}.self_attention", f"{block}.attn1"),
        Rule(f"{ours}.cross_norm", f"{block}.norm2"),
        *_diffusers_attention(f"{ours}.cross_attention", f"{block}.attn2"),
        Rule(f"{ours}.mlp_norm", f"{block}.norm3"),
        *_diffusers_mlp(f"{ours}.mlp", f"{block}.ff"),
        Rule(f"{ours}.proj_out", f"{theirs}.proj_out"),
    )


def _self_attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (Rule(f"{ours}.norm", f"{theirs}.group_norm"), *_diffusers_attention(ours, theirs))


def _unet(attention: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    return (
        Rule("conv_in", "conv_in"),
        Rule("timestep.fc1", "time_embedding.linear_1"),
        Rule("timestep.fc2", "time_embedding.linear_2"),
        *(
            rule
            for ours, theirs in (
                ("down_*", "down_blocks.*"),
                ("mid", "mid_block"),
                ("up_*", "up_blocks.*"),
            )
            for rule in (
                *_resnet(f"{ours}_resnet_*", f"{theirs}.resnets.*"),
                *attention(f"{ours}_attention_*", f"{theirs}.attentions.*"),
            )
        ),
        Rule("down_*_downsample", "down_blocks.*.downsamplers.0.conv"),
        Rule("up_*_upsample", "up_blocks.*.upsamplers.0.conv"),
        Rule("norm_out", "conv_norm_out"),
        Rule("conv_out", "conv_out"),
    )


# `unet` as diffusers' UNet2DConditionModel, its class embedding left out.
UNET = _unet(_unet_attention)
# `unet2d` with the conditioner film as diffusers' UNet2DModel.
UNET2D = (Rule("class_embed", "class_embedding"), *_unet(_self_attention))


def _autoencoder_half(coder: str, part: str, resample: tuple[str, str]) -> tuple[Rule, ...]:
    attention, middle = f"{coder}.mid_block.attentions.0", f"{coder}.mid_attention"
    # Checkpoints from before diffusers 0.15 name the projections as in the second table.
    old = {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
    return (
        Rule(f"{coder}.conv_in", f"{coder}.conv_in"),
        *_resnet(f"{coder}.mid_resnet_*", f"{coder}.mid_block.resnets.*"),
        *_self_attention(middle, attention),
        *(Rule(f"{middle}.{ours}", f"{attention}.{theirs}") for ours, theirs in old.items()),
        *_resnet(f"{coder}.{part}_*_resnet_*", f"{coder}.{part}_blocks.*.resnets.*"),
        Rule(f"{coder}.{part}_*_{resample[0]}", f"{coder}.{part}_blocks.*.{resample[1]}.0.conv"),
        Rule(f"{coder}.norm_out", f"{coder}.conv_norm_out"),
        Rule(f"{coder}.conv_out", f"{coder}.conv_out"),
    )


# diffusers' AutoencoderKL, such as Stable Diffusion's, and VQModel.
AUTOENCODER = (
    Rule("codebook", "quantize.embedding"),
    Rule("quant_conv", "quant_conv"),
    Rule("post_quant_conv", "post_quant_conv"),
    *_autoencoder_half("encoder", "down", ("downsample", "downsamplers")),
    *_autoencoder_half("decoder", "up", ("upsample", "upsamplers")),
)


def _clip(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule("words", f"{prefix}embeddings.token_embedding"),
        *_clip_tower(prefix),
        Rule("norm_out", f"{prefix}final_layer_norm"),
    )


def _clip_tower(prefix: str) -> tuple[Rule, ...]:
    layer = f"{prefix}encoder.layers.*"
    return (
        Rule("positions", f"{prefix}embeddings.position_embedding"),
        Rule("blocks.*.norm1", f"{layer}.layer_norm1"),
        Rule("blocks.*.attention.query", f"{layer}.self_attn.q_proj"),
        Rule("blocks.*.attention.key", f"{layer}.self_attn.k_proj"),
        Rule("blocks.*.attention.value", f"{layer}.self_attn.v_proj"),
        Rule("blocks.*.attention.out", f"{layer}.self_attn.out_proj"),
        Rule("blocks.*.norm2", f"{layer}.layer_norm2"),
        Rule("blocks.*.mlp.fc1", f"{layer}.mlp.fc1"),
        Rule("blocks.*.mlp.fc2", f"{layer}.mlp.fc2"),
    )


# transformers' CLIPTextModel, which has the prefix before version 5, and the text tower of its
# CLIPModel; the second pattern is what the latter's files hold besides.
CLIP_TEXT = (*_clip("text_model."), *_clip(""))
CLIP_OTHERS = r"vision_model\..*|(visual|text)_projection\..*|logit_scale|.*\.position_ids"


def clip_image(patch: int) -> tuple[Rule, ...]:
    """The image tower, with its projection, of transformers' CLIPModel."""
    embeddings = "vision_model.embeddings"
    return (
        Rule("class_embed", f"{embeddings}.class_embedding"),
        Rule("patch_embed", f"{embeddings}.patch_embedding", patches(patch)),
        *_clip_tower("vision_model."),
        Rule("norm_in", "vision_model.pre_layrnorm"),  # so misspelt there
        Rule("norm_out", "vision_model.post_layernorm"),
        Rule("projection", "visual_projection"),
    )


# The matrix that takes a CLIPModel's text features to where its pictures' are.
CLIP_PROJECTION = (Rule("text_projection", "text_projection"),)
# What files of a CLIPModel hold besides the image tower, and besides that matrix.
CLIP_IMAGE_OTHERS = r"text_model\..*|text_projection\..*|logit_scale|.*\.position_ids"
CLIP_PROJECTION_OTHERS = r"(?!text_projection\.).*"
