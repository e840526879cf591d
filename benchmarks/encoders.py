"""Frozen encoders against their originals: `python -m benchmarks.encoders --clip=DIR --vae=DIR`.

Loads the same folders (or hub ids) with transformers and diffusers in PyTorch and compares in f32
the ids, tokens and pooled features of captions of `shapes`, and the moments and decoded images of
its images. Prints the largest errors, relative to the largest value; exits with 1 above LIMIT.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import TextEncoder
from condiff_jax.data.augment import center
from condiff_jax.data.shapes import Shapes
from condiff_jax.models import clip, kl
from condiff_jax.models.autoencoder import to_float
from condiff_jax.pretrained import weights
from condiff_jax.pretrained.encoders import Autoencoder, Clip

LIMIT = 1e-4
COUNT = 4  # captions and images
MORE_CAPTIONS = ("", "Two  DOGS' 3 caf\u00e9s!", "a very long caption " * 100)


def relative(model, reference: torch.Tensor) -> float:
    """Largest error over the largest value."""
    model, reference = np.asarray(model, np.float64), reference.detach().double().numpy()
    return float(np.abs(model - reference).max() / np.abs(reference).max())


def compare_clip(path: str) -> dict[str, float]:
    """Errors of CLIP's text tower; ValueError if the token ids differ."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = weights.locate(path, clip.CONFIG, *clip.WORDS)
    reference = CLIPTextModel.from_pretrained(folder, local_files_only=True).eval()
    length, width = reference.config.max_position_embeddings, reference.config.hidden_size
    model = Clip(TextEncoder("clip", str(folder), length, width))
    captions = [*(Shapes("validation")[i]["caption"] for i in range(COUNT)), *MORE_CAPTIONS]
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    expected = tokenizer(captions, padding="max_length", max_length=length, truncation=True)
    pairs = [model.tokenize(caption) for caption in captions]
    ids, mask = (np.stack(part) for part in zip(*pairs, strict=True))
    if ids.tolist() != expected["input_ids"] or mask.tolist() != expected["attention_mask"]:
        raise ValueError(f"{folder}: token ids differ from those of transformers' tokenizer")
    text = jax.jit(model.apply)({"params": model.load()}, ids, mask)
    with torch.no_grad():
        out = reference(torch.tensor(ids).long())
    return {
        "tokens": relative(text.tokens, out.last_hidden_state),
        "pooled": relative(text.pooled, out.pooler_output),
    }


def compare_vae(path: str, side: int) -> dict[str, float]:
    """Errors of an autoencoder on images of `side` pixels; its config has its size."""
    from diffusers import AutoencoderKL

    folder = weights.locate(path, clip.CONFIG)
    reference = AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()
    config = reference.config
    channels = tuple(config.block_out_channels)
    size = kl.Size(channels, config.latent_channels, config.layers_per_block)
    model = kl.AutoencoderKL(size)
    params = Autoencoder(str(folder), model).load()
    images = [center(Shapes("validation")[i]["image"], side) for i in range(COUNT)]
    x = to_float(np.stack(images))

    def run(method: str, x) -> np.ndarray:
        return np.array(
            jax.jit(lambda p, x: model.apply({"params": p}, x, method=method))(params, x)
        )

    def torch_layout(x) -> torch.Tensor:
        return torch.tensor(np.array(x)).permute(0, 3, 1, 2)

    moments = run("encode", x)
    mean = jnp.split(moments, 2, axis=-1)[0]
    with torch.no_grad():
        encoded = reference.encode(torch_layout(x)).latent_dist.parameters
        decoded = reference.decode(torch_layout(mean)).sample
    return {
        "moments": relative(moments, encoded.permute(0, 2, 3, 1)),
        "pictures": relative(run("decode", mean), decoded.permute(0, 2, 3, 1)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0 if all errors are below LIMIT, 1 if not, 2 for unreadable folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", help="folder or hub id of CLIP ViT-L/14")
    parser.add_argument("--vae", help="folder or hub id of an AutoencoderKL of diffusers")
    parser.add_argument("--side", type=int, default=256, help="of the images, pixels")
    options = parser.parse_args(arguments)
    if not options.clip and not options.vae:
        parser.error("name --clip, --vae or both")
    checks: dict[str, Callable] = {}
    if options.clip:
        checks["clip"] = lambda: compare_clip(options.clip)
    if options.vae:
        checks["vae"] = lambda: compare_vae(options.vae, options.side)
    worst = 0.0
    for name, check in checks.items():
        try:
            with jax.default_matmul_precision("highest"):  # accelerators would round f32
                errors = check()
        except (ConfigError, OSError, ValueError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        for what, error in errors.items():
            print(f"{name:<6}{what:<10}{error:>10.1e}")
        worst = max(worst, *errors.values())
    result = "equal to" if worst < LIMIT else "NOT equal to"
    print(f"{result} the originals: largest relative error {worst:.1e}, limit {LIMIT:.0e}")
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
