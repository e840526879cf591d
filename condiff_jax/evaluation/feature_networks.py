"""Published feature networks of the metrics (Inception-v3, CLIP), loaded from their weight files.

This package contains no weights. Paths are local or remote files or folders, or hub ids.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from condiff_jax.config.errors import one_line
from condiff_jax.evaluation.metrics import clean
from condiff_jax.evaluation.metrics.clip_score import ClipScore, square
from condiff_jax.evaluation.metrics.features import FeatureNetwork
from condiff_jax.models import clip, inception
from condiff_jax.pretrained import key_maps, weights
from condiff_jax.pretrained.encoders import local
from condiff_jax.pretrained.layout import from_torch

INCEPTION_SOURCE = (
    "pt_inception-2015-12-05-6726825d.pth of github.com/mseitzer/pytorch-fid/releases/tag/"
    "fid_weights, or weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases"
)
CLIP_SOURCE = "a folder or hub id of a CLIPModel, such as openai/clip-vit-large-patch14"
TEXTS = 64  # captions per batch


@functools.cache
def inception_shapes() -> dict:
    """Return shapes and types of Inception's parameters; cached, because tracing takes seconds."""
    example = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), example)["params"]


def load_inception(path: str) -> FeatureNetwork:
    """Load FID's Inception-v3: features (N, 2048) of images of any size, which it resizes itself.

    path: pytorch-fid's or torch-fidelity's weights, which are the same, as .pth (reading it needs
    PyTorch) or .safetensors. FileNotFoundError without them, ValueError where they do not fit.
    """
    location = _locate(path, "Inception", INCEPTION_SOURCE)
    try:
        # BatchNorm's batch counter is not a parameter.
        tensors = weights.read(str(location), r".*\.num_batches_tracked")
        params = from_torch(tensors, inception_shapes())
    except ValueError as error:
        raise ValueError(_misfit(path, "Inception", error, INCEPTION_SOURCE)) from error
    sha256 = weights.sha256(weights.weight_files(location))
    return _inception_network("Inception-v3 2015-12-05", sha256, params)


def random_inception() -> FeatureNetwork:
    """Create FID's network with random weights, to test evaluations; its metrics mean nothing."""
    example = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    params = jax.jit(inception.InceptionV3().init)(jax.random.key(0), example)["params"]
    # Each ReLU halves the variance; He scaling compensates (arXiv:1502.01852).
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 2**0.5 if path[-1].key == "kernel" else leaf, params
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return _inception_network("Inception-v3 with random weights", digest.hexdigest(), params)


def _inception_network(name: str, sha256: str, params: dict) -> FeatureNetwork:
    return FeatureNetwork(
        name=name,
        sha256=sha256,
        width=inception.WIDTH,
        params=params,
        apply=inception.features,
        prepare=inception.resize,
    )


@functools.lru_cache(maxsize=8)  # keeps compiled networks
def resized(network: FeatureNetwork, method: str) -> FeatureNetwork:
    """Return Inception with its own resizing (method tf) or that of clean-fid (clean)."""
    prepare = {"tf": None, "clean": clean.resize}[method]
    return dataclasses.replace(network, prepare=prepare, resize=method) if prepare else network


def load_clip(path: str) -> ClipScore:
    """Load the CLIP score of a CLIPModel; its image tower, as a feature network, is `.images`.

    path: a folder with config.json, vocab.json, merges.txt and weights, or a hub id, in
    transformers' layout. FileNotFoundError without them, ValueError where they do not fit.
    """
    text_files = (clip.CONFIG, *clip.WORDS)
    location = _locate(path, "CLIP", CLIP_SOURCE, text_files)
    with local(location, text_files) as folder:
        if not (folder / clip.CONFIG).exists():
            raise FileNotFoundError(f"no {clip.CONFIG} in {path}: give {CLIP_SOURCE}")
        size, image_size = clip.Size.read(folder), clip.ImageSize.read(folder)
        tokenizer = clip.Tokenizer.read(folder)
    text_tower = clip.TextTower(size)
    image_tower = clip.ImageTower(image_size)
    try:
        tensors = weights.read(str(location))
        text_params, image_params = _clip_params(tensors, text_tower, image_tower)
    except ValueError as error:
        raise ValueError(_misfit(path, "CLIP", error, CLIP_SOURCE)) from error
    return ClipScore(
        FeatureNetwork(
            name=f"CLIP image tower {image_size.width} x {image_size.depth}",
            sha256=weights.sha256(weights.weight_files(location)),
            width=image_size.embedding,
            params=image_params,
            apply=partial(_embed_images, image_tower),
            prepare=partial(square, side=image_size.side),
        ),
        _text_embedder(text_tower, tokenizer, text_params),
    )


def _locate(path: str, name: str, source: str, more_files: Sequence[str] = ()) -> Any:
    """Find the file or folder of a path or hub id; FileNotFoundError names the source of weights.

    more_files: names of files that a hub id provides besides weights.
    """
    try:
        if not path:
            raise FileNotFoundError(f"no path to {name}'s weights")
        location = weights.locate(path, *more_files)
        weights.weight_files(location)
        return location
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{one_line(error)}; give {source}") from error


def _misfit(path: str, name: str, error: ValueError, source: str) -> str:
    return f"{path} does not fit {name}: {one_line(error)}; give {source}"


def _clip_params(
    tensors: Mapping[str, np.ndarray], text: clip.TextTower, image: clip.ImageTower
) -> tuple[dict, dict]:
    """Return the parameters of the text tower, with its projection, and of the image tower."""

    def convert(rules, unused, shapes):
        used = {name: a for name, a in tensors.items() if not re.fullmatch(unused, name)}
        return from_torch(key_maps.from_published(used, rules), shapes)

    key, side = jax.random.key(0), image.size.side
    ids = jnp.zeros((1, text.size.length), jnp.int32)
    shapes = jax.eval_shape(text.init, key, ids, ids > 0)["params"]
    tower = convert(key_maps.CLIP_TEXT, key_maps.CLIP_TEXT_IGNORED, shapes)
    kernel = jax.ShapeDtypeStruct((text.size.width, image.size.embedding), jnp.float32)
    shapes = {"text_projection": {"kernel": kernel}}
    projection = convert(key_maps.CLIP_PROJECTION, key_maps.CLIP_PROJECTION_IGNORED, shapes)
    shapes = jax.eval_shape(image.init, key, jnp.zeros((1, side, side, 3)))["params"]
    rules = key_maps.clip_image(image.size.patch)
    image_params = convert(rules, key_maps.CLIP_IMAGE_IGNORED, shapes)
    return {"tower": tower, **projection}, image_params


def _embed_images(tower: clip.ImageTower, params: dict, images: jax.Array) -> jax.Array:
    return tower.apply({"params": params}, clip.normalize(images))


def _text_embedder(
    tower: clip.TextTower, tokenizer: clip.Tokenizer, params: dict
) -> Callable[[Sequence[str]], np.ndarray]:
    """Return the function from N > 0 captions to their embeddings (N, E) f32."""
    params = jax.device_put(params)

    @jax.jit
    def embed(params, ids, mask):
        with jax.default_matmul_precision("highest"):
            pooled = tower.apply({"params": params["tower"]}, ids, mask).pooled
            return pooled @ params["text_projection"]["kernel"]

    def embed_captions(captions):
        pairs = [tokenizer(caption, tower.size.length) for caption in captions]
        ids, mask = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        parts = [slice(i, i + TEXTS) for i in range(0, len(ids), TEXTS)]
        return np.concatenate([np.asarray(embed(params, ids[p], mask[p])) for p in parts])

    return embed_captions
