"""A random tiny CLIP in a folder as transformers writes it."""

import json
from pathlib import Path

import torch
import transformers

LENGTH, WIDTH = 8, 16  # of texts and of features, as tests/tiny.py has them
WORDS = ("a", "red", "blue", "circle", "ring", "square", "small", "large")


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """(tokens, merges): all bytes, each also at the end of a word, and WORDS."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [i for i in range(256) if i not in visible]
    letters = [chr(i) for i in visible] + [chr(256 + n) for n in range(len(hidden))]
    tokens, merges = [*letters, *(letter + "</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = f"{parts[0]} {parts[1]}"
            parts = [parts[0] + parts[1], *parts[2:]]
            if pair not in merges:
                merges.append(pair)
                tokens.append(parts[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges


TOKENS, MERGES = vocabulary()
START, END = TOKENS["<|startoftext|>"], TOKENS["<|endoftext|>"]


def split(folder: Path) -> Path:
    """Make of such a folder one of Stable Diffusion's, with other parts as it has them."""
    for name in ("text_encoder", "tokenizer", "unet"):
        (folder / name).mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(folder / "text_encoder" / name)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(folder / "tokenizer" / name)
    (folder / "model_index.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no text")
    return folder


def write(
    folder: Path, *, seed: int = 0, whole: bool = False, vision: dict | None = None, **settings
) -> Path:
    """config.json, model.safetensors, vocab.json and merges.txt; whole: of the CLIPModel.

    vision: settings of its image tower.
    """
    config = dict(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=START,
        eos_token_id=END,
    )
    config |= settings
    torch.manual_seed(seed)
    if whole:
        picture = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
        picture |= dict(num_attention_heads=1, image_size=8, patch_size=4)
        picture |= vision or {}
        both = transformers.CLIPConfig(text_config=config, vision_config=picture)
        model = transformers.CLIPModel(both)
    else:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():  # leave nothing zero, one or small
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(TOKENS))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return folder
