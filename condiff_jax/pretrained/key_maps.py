"""Key maps of published checkpoints: rules between our names (PyTorch's layout) and theirs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

Arrays = list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """Layout of a published tensor.

    pack(our tensors) -> published tensor, unpack(published tensor, count) -> our tensors.
    """

    pack: Callable[[Arrays], np.ndarray] = lambda arrays: arrays[0]
    unpack: Callable[[np.ndarray, int], Arrays] = lambda array, count: [array]


def _swap(array: np.ndarray) -> np.ndarray:
    return np.concatenate(np.split(array, 2)[::-1])


SAME = Form()
# Queries, keys and values concatenated in one tensor.
PACKED = Form(np.concatenate, np.split)
# Our (shift, scale) is (scale, shift) in diffusers' AdaLayerNormContinuous.
SWAPPED = Form(lambda arrays: _swap(arrays[0]), lambda array, _: [_swap(array)])
# A duplicate of a tensor, written by `to_published` and ignored by `from_published`.
COPY = Form()
# The published tensor has a leading dimension of 1.
BATCHED = Form(lambda arrays: arrays[0][None], lambda array, _: [array[0]])


def patches(side: int) -> Form:
    """Layout of a patch embedding: our linear layer (D, p p C), their convolution (D, C, p, p)."""

    def pack(arrays):
        (array,) = arrays
        if array.ndim == 1:  # bias
            return array
        return array.reshape(len(array), side, side, -1).transpose(0, 3, 1, 2)

    def unpack(array, _):
        return [array if array.ndim == 1 else array.transpose(0, 2, 3, 1).reshape(len(array), -1)]

    return Form(pack, unpack)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Map from our modules (or bare parameters) to a published one; each "*" is an index."""

    modules: str | Sequence[str]
    published: str
    form: Form = SAME

    @property
    def names(self) -> Sequence[str]:
        """Names of our modules, as a sequence."""
        return (self.modules,) if isinstance(self.modules, str) else self.modules


def _match(template: str, name: str) -> tuple[tuple[str, ...], str] | None:
    """Match a name to a template: indices and leaf (".weight", ".bias" or ""), or None."""
    pattern = re.escape(template).replace(r"\*", r"(\d+)") + r"(\.weight|\.bias)?"
    match = re.fullmatch(pattern, name)
    return match and (match.groups()[:-1], match.groups()[-1] or "")


def _fill(template: str, indices: tuple[str, ...], leaf: str) -> str:
    for index in indices:
        template = template.replace("*", index, 1)
    return template + leaf


def to_published(tensors: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict:
    """Rename and pack our tensors (PyTorch's layout); ValueError for tensors without a rule."""
    out = {}
    unused = set(tensors)
    for rule in rules:
        for name in tensors:
            match = _match(rule.names[0], name)
            if not match or (name not in unused and rule.form is not COPY):
                continue
            names = [_fill(part, *match) for part in rule.names]
            out[_fill(rule.published, *match)] = rule.form.pack([tensors[part] for part in names])
            unused -= set(names)
    _check_all_used(unused)
    return out


def from_published(state: Mapping[str, np.ndarray], rules: Sequence[Rule]) -> dict:
    """Invert `to_published`; if several rules match a name, the first one applies."""
    out = {}
    unused = set(state)
    for rule in rules:
        for name in state:
            if name not in unused:
                continue
            match = _match(rule.published, name)
            if not match:
                continue
            names = [_fill(part, *match) for part in rule.names]
            arrays = rule.form.unpack(np.asarray(state[name]), len(names))
            if rule.form is not COPY:
                out |= dict(zip(names, arrays, strict=True))
            unused.remove(name)
    _check_all_used(unused)
    return out


def _check_all_used(unused: set[str]) -> None:
    if unused:
        more = f" and {len(unused) - 10} more" if len(unused) > 10 else ""
        raise ValueError(f"no rule for {', '.join(sorted(unused)[:10])}{more}")


def _qkv(module: str) -> tuple[str, ...]:
    return tuple(f"{module}.{part}" for part in ("query", "key", "value"))


def facebook_dit(patch: int) -> tuple[Rule, ...]:
    """Rules for `dit_ln` in the layout of facebookresearch/DiT, without its fixed pos_embed."""
    return (
        Rule("patch_embed", "x_embedder.proj", patches(patch)),
        Rule("timestep.mlp.fc1", "t_embedder.mlp.0"),
        Rule("timestep.mlp.fc2", "t_embedder.mlp.2"),
        Rule("class_embed", "y_embedder.embedding_table"),
        *_dit_block("blocks", "blocks"),
        Rule("final_modulation", "final_layer.adaLN_modulation.1"),
        Rule("final", "final_layer.linear"),
    )


def _dit_block(module: str, published: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{module}.*.modulation", f"{published}.*.adaLN_modulation.1"),
        Rule(_qkv(f"{module}.*.attention"), f"{published}.*.attn.qkv", PACKED),
        Rule(f"{module}.*.attention.out", f"{published}.*.attn.proj"),
        Rule(f"{module}.*.mlp.fc1", f"{published}.*.mlp.fc1"),
        Rule(f"{module}.*.mlp.fc2", f"{published}.*.mlp.fc2"),
    )


def diffusers_dit(patch: int, depth: int) -> tuple[Rule, ...]:
    """Rules for `dit_ln` as DiTTransformer2DModel, which copies the embedders to every block."""
    block = "transformer_blocks.*"
    embedders = [
        Rule(module, f"transformer_blocks.{i}.norm1.emb.{published}", SAME if i == 0 else COPY)
        for i in range(depth)
        for module, published in (
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


def _diffusers_attention(module: str, published: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{module}.query", f"{published}.to_q"),
        Rule(f"{module}.key", f"{published}.to_k"),
        Rule(f"{module}.value", f"{published}.to_v"),
        Rule(f"{module}.out", f"{published}.to_out.0"),
    )


def _diffusers_mlp(module: str, published: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{module}.fc1", f"{published}.net.0.proj"),
        Rule(f"{module}.fc2", f"{published}.net.2"),
    )


def pixart(patch: int) -> tuple[Rule, ...]:
    """Rules for `pixart` with text as diffusers' PixArtTransformer2DModel."""
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
    """Rules for `mdtv2` in the layout of sail-sg/MDT."""
    groups = {
        "in_blocks.*": "en_inblocks.*",
        "out_blocks.*": "en_outblocks.*",
        "decoder_blocks.*": "de_blocks.*",
        "side_block": "sideblocks.0",
    }
    blocks = [
        Rule(
            tuple(part.replace("blocks.*", module, 1) for part in rule.names),
            rule.published.replace("blocks.*", published, 1),
            rule.form,
        )
        for module, published in groups.items()
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
    """Rules for `mmdit` with text and streams=full as diffusers' SD3Transformer2DModel."""
    last = f"transformer_blocks.{depth - 1}"
    return (
        Rule("patch_embed", "pos_embed.proj", patches(patch)),
        Rule("caption", "context_embedder"),
        Rule("timestep.mlp.fc1", "time_text_embed.timestep_embedder.linear_1"),
        Rule("timestep.mlp.fc2", "time_text_embed.timestep_embedder.linear_2"),
        Rule("pooled.fc1", "time_text_embed.text_embedder.linear_1"),
        Rule("pooled.fc2", "time_text_embed.text_embedder.linear_2"),
        # The context modulation of the last block has two parts, like the final layer.
        Rule("last_block.context_modulation", f"{last}.norm1_context.linear", SWAPPED),
        *_sd3_block("last_block", last),
        *_sd3_block("blocks.*", "transformer_blocks.*"),
        Rule("final_modulation", "norm_out.linear", SWAPPED),
        Rule("final", "proj_out"),
    )


def _sd3_block(module: str, published: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{module}.modulation", f"{published}.norm1.linear"),
        Rule(f"{module}.context_modulation", f"{published}.norm1_context.linear"),
        *_diffusers_attention(module, f"{published}.attn"),
        Rule(f"{module}.context_query", f"{published}.attn.add_q_proj"),
        Rule(f"{module}.context_key", f"{published}.attn.add_k_proj"),
        Rule(f"{module}.context_value", f"{published}.attn.add_v_proj"),
        Rule(f"{module}.context_out", f"{published}.attn.to_add_out"),
        Rule(f"{module}.query_norm", f"{published}.attn.norm_q"),
        Rule(f"{module}.key_norm", f"{published}.attn.norm_k"),
        Rule(f"{module}.context_query_norm", f"{published}.attn.norm_added_q"),
        Rule(f"{module}.context_key_norm", f"{published}.attn.norm_added_k"),
        *_diffusers_mlp(f"{module}.mlp", f"{published}.ff"),
        *_diffusers_mlp(f"{module}.context_mlp", f"{published}.ff_context"),
    )


def _resnet(module: str, published: str) -> tuple[Rule, ...]:
    parts = {"time": "time_emb_proj", "shortcut": "conv_shortcut"}
    names = ("norm1", "conv1", "time", "norm2", "conv2", "shortcut")
    return tuple(Rule(f"{module}.{part}", f"{published}.{parts.get(part, part)}") for part in names)


def _unet_attention(module: str, published: str) -> tuple[Rule, ...]:
    block = f"{published}.transformer_blocks.0"
    return (
        Rule(f"{module}.norm", f"{published}.norm"),
        Rule(f"{module}.proj_in", f"{published}.proj_in"),
        Rule(f"{module}.self_norm", f"{block}.norm1"),
        *_diffusers_attention(f"{module}.self_attention", f"{block}.attn1"),
        Rule(f"{module}.cross_norm", f"{block}.norm2"),
        *_diffusers_attention(f"{module}.cross_attention", f"{block}.attn2"),
        Rule(f"{module}.mlp_norm", f"{block}.norm3"),
        *_diffusers_mlp(f"{module}.mlp", f"{block}.ff"),
        Rule(f"{module}.proj_out", f"{published}.proj_out"),
    )


def _self_attention(module: str, published: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{module}.norm", f"{published}.group_norm"),
        *_diffusers_attention(module, published),
    )


def _unet(attention: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    return (
        Rule("conv_in", "conv_in"),
        Rule("timestep.fc1", "time_embedding.linear_1"),
        Rule("timestep.fc2", "time_embedding.linear_2"),
        *(
            rule
            for module, published in (
                ("down_*", "down_blocks.*"),
                ("mid", "mid_block"),
                ("up_*", "up_blocks.*"),
            )
            for rule in (
                *_resnet(f"{module}_resnet_*", f"{published}.resnets.*"),
                *attention(f"{module}_attention_*", f"{published}.attentions.*"),
            )
        ),
        Rule("down_*_downsample", "down_blocks.*.downsamplers.0.conv"),
        Rule("up_*_upsample", "up_blocks.*.upsamplers.0.conv"),
        Rule("norm_out", "conv_norm_out"),
        Rule("conv_out", "conv_out"),
    )


# Rules for `unet` as diffusers' UNet2DConditionModel, without the class embedding.
UNET = _unet(_unet_attention)
# Rules for `unet2d` with the conditioner film as diffusers' UNet2DModel.
UNET2D = (Rule("class_embed", "class_embedding"), *_unet(_self_attention))


def _autoencoder_half(coder: str, part: str, resample: tuple[str, str]) -> tuple[Rule, ...]:
    attention, middle = f"{coder}.mid_block.attentions.0", f"{coder}.mid_attention"
    # These are the names of the projections before diffusers 0.15.
    old = {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
    return (
        Rule(f"{coder}.conv_in", f"{coder}.conv_in"),
        *_resnet(f"{coder}.mid_resnet_*", f"{coder}.mid_block.resnets.*"),
        *_self_attention(middle, attention),
        *(
            Rule(f"{middle}.{module}", f"{attention}.{published}")
            for module, published in old.items()
        ),
        *_resnet(f"{coder}.{part}_*_resnet_*", f"{coder}.{part}_blocks.*.resnets.*"),
        Rule(f"{coder}.{part}_*_{resample[0]}", f"{coder}.{part}_blocks.*.{resample[1]}.0.conv"),
        Rule(f"{coder}.norm_out", f"{coder}.conv_norm_out"),
        Rule(f"{coder}.conv_out", f"{coder}.conv_out"),
    )


# Rules for diffusers' AutoencoderKL, such as Stable Diffusion's, and VQModel.
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


# Rules for transformers' CLIPTextModel, which has the prefix before version 5, and for the text
# tower of its CLIPModel. The pattern matches the other tensors of a CLIPModel.
CLIP_TEXT = (*_clip("text_model."), *_clip(""))
CLIP_TEXT_IGNORED = r"vision_model\..*|(visual|text)_projection\..*|logit_scale|.*\.position_ids"


def clip_image(patch: int) -> tuple[Rule, ...]:
    """Rules for the image tower of transformers' CLIPModel, with its projection."""
    embeddings = "vision_model.embeddings"
    return (
        Rule("class_embed", f"{embeddings}.class_embedding"),
        Rule("patch_embed", f"{embeddings}.patch_embedding", patches(patch)),
        *_clip_tower("vision_model."),
        Rule("norm_in", "vision_model.pre_layrnorm"),  # misspelled in transformers
        Rule("norm_out", "vision_model.post_layernorm"),
        Rule("projection", "visual_projection"),
    )


# Rule for the projection of a CLIPModel's text features to the joint embedding space.
CLIP_PROJECTION = (Rule("text_projection", "text_projection"),)
# Patterns of the other tensors of a CLIPModel, besides the image tower and the text projection.
CLIP_IMAGE_IGNORED = r"text_model\..*|text_projection\..*|logit_scale|.*\.position_ids"
CLIP_PROJECTION_IGNORED = r"(?!text_projection\.).*"
