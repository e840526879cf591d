"""CLIP score (arXiv:2104.08718): 100 x the cosine of the CLIP features of image and caption.

Captions get no template such as "a photo of", and are cut to the text tower's length, 77 tokens.
The cosine is not clipped at 0 and not rescaled by 2.5. Scores of CLIP models of different sizes do
not compare; the paper does not name its model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from condiff_jax.evaluation.metrics.features import FeatureNetwork


@dataclasses.dataclass(frozen=True, eq=False)
class ClipScore:
    """Scores f32 (N,) of images uint8 (N, H, W, 3) and N captions; report their mean.

    images: CLIP's image tower. texts: captions -> (N, images.width), of the same model.
    """

    images: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Compute the scores; ValueError for unequal numbers, and as `FeatureNetwork` raises it."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} images, but {len(captions)} captions")
        return 100 * (_unit(self.images(images)) * _unit(self.texts(captions))).sum(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("CLIP returns features that are 0, NaN or infinite")
    return vectors / lengths


def square(images: np.ndarray, side: int) -> np.ndarray:
    """Preprocess images uint8 (N, H, W, 3) as in CLIP's training: uint8 (N, side, side, 3).

    The short side is resized to `side` by antialiased bicubic interpolation (Pillow's, as in the
    preprocessing of OpenAI and transformers), and the long side is center-cropped.
    """
    short = min(images.shape[1:3])
    height, width = (side * n // short for n in images.shape[1:3])
    top, left = (height - side) // 2, (width - side) // 2
    if (height, width) == images.shape[1:3]:
        resized = images
    else:
        bicubic = Image.Resampling.BICUBIC
        size = (width, height)
        resized = [np.asarray(Image.fromarray(image).resize(size, bicubic)) for image in images]
    return np.stack([image[top : top + side, left : left + side] for image in resized])
