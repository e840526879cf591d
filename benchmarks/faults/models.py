"""Faults in models/."""

from __future__ import annotations

from benchmarks.faults.base import of

DIT, MDT = (f"test_equals_the_original[{name}]" for name in (
    "dit_ln-facebookresearch/DiT layout", "mdtv2-sail-sg/MDT layout"))  # fmt: skip

FAULTS = [
    *of(
        "models/layers.py", "models/test_layers.py",
        ("AdaLN without 1 +", "test_modulate_by_hand", "x * (1 + scale[:, None])",
         "x * scale[:, None]"),
        ("LayerNorm without centering", "test_layer_norm_agrees_with_torch",
         "y - y.mean(-1, keepdims=True)", "y"),
        ("AdaGN with 1 +", "test_adagn_by_hand", "(scale * norm(h)", "((1 + scale) * norm(h)"),
        ("positions of the own grid",
         "test_resampled_positions_have_the_same_limits_at_every_resolution",
         "np.linspace(0, base, grid)", "np.linspace(0, grid, grid)"),
        ("rows before columns", "test_position_embedding_by_hand",
         "encode(cols.ravel()), encode(rows.ravel())",
         "encode(rows.ravel()), encode(cols.ravel())"),
        ("patches transposed", "test_patchify_by_hand",
         "patch, c).swapaxes(2, 3)", "patch, c).swapaxes(2, 3).swapaxes(3, 4)"),
    ),
    *of(
        "models/layers.py", "models/test_transformers.py",
        ("queries and keys not normalized", "test_qk_norm_applies_to_attention_to_conditions",
         "if not enabled:", "if True:"),
    ),
    *of(
        "models/attention.py", "models/test_attention.py",
        ("attention scaled by the head size", "test_attention_agrees_with_torch",
         "q = q * q.shape[-1] ** -0.5", "q = q / q.shape[-1]"),
        ("softmax over queries", "test_attention_agrees_with_torch",
         "jax.nn.softmax(logits, axis=-1)", "jax.nn.softmax(logits, axis=-2)"),
        ("softmax in bf16", "test_attention_has_an_f32_softmax",
         ", preferred_element_type=jnp.float32)", ")"),
    ),
    *of(
        "models/dit.py", "test_parity.py",
        ("DiT: attention past its gate", DIT, "x = x + gate1[:, None] * y", "x = x + y"),
        ("DiT: MLP past its gate", DIT, "return x + gate2[:, None] * y", "return x + y"),
        ("DiT: the MLP's AdaLN is the attention's", DIT,
         "layers.layer_norm(x), shift2, scale2)", "layers.layer_norm(x), shift1, scale1)"),
    ),
    *of(
        "models/transformer.py", "test_parity.py",
        ("the last AdaLN swaps shift and scale", DIT,
         "layers.layer_norm(tokens), shift, scale)", "layers.layer_norm(tokens), scale, shift)"),
        ("no position embedding", DIT,
         "self.patches(x) + jnp.asarray(self.positions(x), self.dtype)", "self.patches(x)"),
    ),
    *of(
        "models/transformer.py", "models/test_transformers.py",
        ("a dropped class is the class", "test_conditions_have_an_effect_unless_dropped",
         "jnp.where(cond.drop_semantics, self.classes, cond.semantics)", "cond.semantics"),
    ),
    *of(
        "models/transformer.py", "models/test_mmdit.py",
        ("dropped text is the text", "test_dropped_semantics_are_the_null_condition",
         "jnp.where(cond.drop_semantics[:, None, None], 0, text.tokens)", "text.tokens"),
    ),
    *of(
        "models/mmdit.py", "models/test_mmdit.py",
        ("mmDiT: blocks past their gate", "test_blocks_are_the_identity_at_initialization",
         "z = z + gate1[:, None] * y", "z = z + y"),
        ("mmDiT: the condition's tokens are zero", "test_blocks_are_tied_two_stream_blocks",
         'parts = {"": y[:, : self.tokens], "context_": y[:, self.tokens :]}',
         'parts = {"": y[:, : self.tokens], "context_": 0 * y[:, self.tokens :]}'),
        ("ours: pooled text in AdaLN", "test_semantics_enter_ours_through_attention_only",
         "        if self.pooled:\n            emb = emb + pooled",
         "        emb = emb + context[:, 0]"),
    ),
    *of(
        "models/mdt.py", "models/test_mdt.py",
        ("MDT: relative positions wrap around", "test_relative_index_depends_on_the_offset",
         "down * (2 * columns - 1) + right", "down * columns + right"),
        ("MDT: one share hidden in all samples", "test_shares_of_hidden_tokens_fill_the_range",
         "jax.random.uniform(key_share, (batch, 1))", "jax.random.uniform(key_share, (1, 1))"),
    ),
    *of(
        "models/mdt.py", "test_parity.py",
        ("MDT: skips in the order of the encoder", MDT, "(x, skips[::-1], emb", "(x, skips, emb"),
    ),
    *of(
        "models/classifier.py", "models/test_classifier.py",
        ("pooling asked by the first pixel",
         "test_pooling_by_hand_and_invariant_to_the_order_of_pixels",
         "pixels.mean(1, keepdims=True)", "pixels[:, :1]"),
    ),
    *of(
        "models/clip.py", "models/test_clip.py",
        ("CLIP: pooled at the largest id", "test_tower_agrees_with_transformers",
         "jnp.argmax(ids if size.end == 2 else ids == size.end, axis=1)",
         "jnp.argmax(ids, axis=1)"),
        ("CLIP: tokens see those after them", "test_padding_has_no_influence",
         "jnp.tril(", "jnp.ones_like("),
    ),
    *of(
        "models/text_encoder.py", "models/test_text_encoder.py",
        ("words pooled with the padding",
         "test_tokens_are_words_plus_positions_and_pooled_is_the_mean_of_those_in_the_mask",
         "(mask / jnp.maximum(mask.sum(1, keepdims=True), 1))",
         "(jnp.ones(mask.shape) / mask.shape[1])"),
    ),
    *of(
        "models/autoencoder.py", "models/test_autoencoder.py",
        ("latents scaled before they are shifted",
         "test_latents_are_sampled_scaled_and_decoded",
         "(latents - self.shift) * self.scale", "latents * self.scale - self.shift"),
    ),
    *of(
        "models/kl.py", "models/test_kl.py",
        ("deviation of the latents is their variance", "test_mean_and_std_agree_with_diffusers",
         "-30, 20) / 2)", "-30, 20))"),
    ),
    *of(
        "models/__init__.py", "objectives/test_diffusion.py",
        ("model.base_resolution ignored",
         "test_positions_span_the_grid_of_the_models_base_resolution",
         "model.base_resolution or config.data.resolution", "config.data.resolution"),
    ),
    *of(
        "models/conditioners/weighted_attn.py", "models/test_conditioners.py",
        ("gamma weights the coarse part too",
         "test_weighted_attn_weights_the_details_alone_with_gamma",
         "h + coarse + gamma * details", "h + gamma * (coarse + details)"),
    ),
    *of(
        "models/conditioners/adanorm.py", "models/test_conditioners.py",
        ("adanorm without LayerNorm", "test_adanorm_by_hand",
         "(layers.layer_norm(h) * (1 + scale)", "(h * (1 + scale)"),
    ),
]  # fmt: skip
