"""The published networks that metrics look at pictures with: where they come from, that they fit.

Nothing of them comes with this package. Paths are local or remote files or folders, or hub ids.
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
TEXTS = 64  # captions at a time


@functools.cache
def inception_shapes() -> dict:
    """The shapes and types of Inception's parameters; tracing it takes seconds."""
    example = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), example)["params"]


def load_inception(path: str) -> FeatureNetwork:
    """FID's Inception-v3: features (N, 2048) of pictures of any size, which it resizes itself.

    path: pytorch-fid's or torch-fidelity's weights, which are the same, as .pth (needs PyTorch to
    be read) or .safetensors. FileNotFoundError without them, ValueError where they do not fit.
    """
    place = _locate(path, "Inception", INCEPTION_SOURCE)
    try:
        # Training's count of batches is no parameter.
        tensors = weights.read(str(place), r".*\.num_batches_tracked")
        params = from_torch(tensors, inception_shapes())
    except ValueError as error:
        raise ValueError(_misfit(path, "Inception", error, INCEPTION_SOURCE)) from error
    return FeatureNetwork(
        name="Inception-v3 2015-12-05",
        sha256=weights.sha256(weights.weight_files(place)),
        width=inception.WIDTH,
        params=params,
        apply=inception.features,
        prepare=inception.resize,
    )


def random_inception() -> FeatureNetwork:
    """FID's network with weights that nobody trained: to try what needs it, not to measure."""
    example = jnp.zeros((1, inception.SIDE, inception.SIDE, 3))
    params = jax.jit(inception.InceptionV3().init)(jax.random.key(0), example)["params"]
    # Each of its many ReLUs halves the variance, which this makes up for (arXiv:1502.01852).
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * 2**0.5 if path[-1].key == "kernel" else leaf, params
    )
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return FeatureNetwork(
        name="Inception-v3 with random weights",
        sha256=digest.hexdigest(),
        width=inception.WIDTH,
        params=params,
        apply=inception.features,
        prepare=inception.resize,
    )


@functools.lru_cache(maxsize=8)  # what is compiled is kept
def resized(network: FeatureNetwork, how: str) -> FeatureNetwork:
    """Inception as it is (tf) or with the resizing of clean-fid (clean)."""
    prepare = {"tf": None, "clean": clean.resize}[how]
    return dataclasses.replace(network, prepare=prepare, resize=how) if prepare else network


def load_clip(path: str) -> ClipScore:
    """CLIP score by a CLIPModel; its image tower alone, as a feature network, is `.images`.

    path: a folder with config.json, vocab.json, merges.txt and weights, or a hub id, in
    transformers' layout. FileNotFoundError without them, ValueError where they do not fit.
    """
    small = (clip.CONFIG, *clip.WORDS)
    place = _locate(path, "CLIP", CLIP_SOURCE, small)
    with local(place, small) as folder:
        if not (folder / clip.CONFIG).exists():
            raise FileNotFoundError(f"no {clip.CONFIG} in {path}: give {CLIP_SOURCE}")
        size, image_size = clip.Size.read(folder), clip.ImageSize.read(folder)
        tokenizer = clip.Tokenizer.read(folder)
    towers = clip.TextTower(size), clip.ImageTower(image_size)
    try:
        tensors = weights.read(str(place))
        text_params, image_params = _clip_params(tensors, *towers)
    except ValueError as error:
        raise ValueError(_misfit(path, "CLIP", error, CLIP_SOURCE)) from error
    return ClipScore(
        FeatureNetwork(
            name=f"CLIP image tower {image_size.width} x {image_size.depth}",
            sha256=weights.sha256(weights.weight_files(place)),
            width=image_size.embedding,
            params=image_params,
            apply=partial(_embed_images, towers[1]),
            prepare=partial(square, side=image_size.side),
        ),
        _text_embedder(towers[0], tokenizer, text_params),
    )


def _locate(path: str, name: str, source: str, others: Sequence[str] = ()) -> Any:
    """The file or folder at a path or of a hub id; FileNotFoundError that says where to get it."""
    try:
        if not path:
            raise FileNotFoundError(f"no path to {name}'s weights")
        place = weights.locate(path, *others)
        weights.weight_files(place)
        return place
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{one_line(error)}; give {source}") from error


def _misfit(path: str, name: str, error: ValueError, source: str) -> str:
    return f"{path} does not do as {name}: {one_line(error)}; give {source}"


def _clip_params(
    tensors: Mapping[str, np.ndarray], text: clip.TextTower, image: clip.ImageTower
) -> tuple[dict, dict]:
    """Of the text tower, with the projection beside, and of the image tower."""

    def fit(rules, others, shapes):
        part = {name: a for name, a in tensors.items() if not re.fullmatch(others, name)}
        return from_torch(key_maps.from_published(part, rules), shapes)

    key, side = jax.random.key(0), image.size.side
    ids = jnp.zeros((1, text.size.length), jnp.int32)
    shapes = jax.eval_shape(text.init, key, ids, ids > 0)["params"]
    tower = fit(key_maps.CLIP_TEXT, key_maps.CLIP_TEXT_IGNORED, shapes)
    kernel = jax.ShapeDtypeStruct((text.size.width, image.size.embedding), jnp.float32)
    shapes = {"text_projection": {"kernel": kernel}}
    projection = fit(key_maps.CLIP_PROJECTION, key_maps.CLIP_PROJECTION_IGNORED, shapes)
    shapes = jax.eval_shape(image.init, key, jnp.zeros((1, side, side, 3)))["params"]
    rules = key_maps.clip_image(image.size.patch)
    return {"tower": tower, **projection}, fit(rules, key_maps.CLIP_IMAGE_IGNORED, shapes)


def _embed_images(tower: clip.ImageTower, params: dict, images: jax.Array) -> jax.Array:
    return tower.apply({"params": params}, clip.normalize(images))


def _text_embedder(
    tower: clip.TextTower, tokenizer: clip.Tokenizer, params: dict
) -> Callable[[Sequence[str]], np.ndarray]:
    """Captions -> (N, E) f32, N > 0."""
    params = jax.device_put(params)

    @jax.jit
    def embed(params, ids, mask):
        with jax.default_matmul_precision("highest"):
            pooled = tower.apply({"params": params["tower"]}, ids, mask).pooled
            return pooled @ params["text_projection"]["kernel"]

    def texts(captions):
        pairs = [tokenizer(caption, tower.size.length) for caption in captions]
        ids, mask = (np.stack(arrays) for arrays in zip(*pairs, strict=True))
        parts = [slice(i, i + TEXTS) for i in range(0, len(ids), TEXTS)]
        return np.concatenate([np.asarray(embed(params, ids[p], mask[p])) for p in parts])

    return texts
