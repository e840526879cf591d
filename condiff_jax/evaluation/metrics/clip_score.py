"""CLIP score (arXiv:2104.08718): how well pictures fit captions, 100 x the cosine of CLIP features.

The caption is taken as it is, without a template such as "a photo of"; it is cut to what the text
tower takes, 77 tokens. The cosine is not cut off at 0 and not rescaled by 2.5. Models of other
sizes give other numbers: the paper does not name its model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from condiff_jax.evaluation.metrics.features import FeatureNetwork


@dataclasses.dataclass(frozen=True, eq=False)
class ClipScore:
    """Scores f32 (N,) of pictures uint8 (N, H, W, 3) and as many captions; report their mean.

    images: CLIP's image tower. texts: captions -> (N, images.width), of the same model.
    """

    images: FeatureNetwork
    texts: Callable[[Sequence[str]], np.ndarray]

    def __call__(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """The scores; ValueError for unlike numbers of both, and as from the network."""
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures, but {len(captions)} captions")
        return 100 * (_unit(self.images(images)) * _unit(self.texts(captions))).sum(1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        raise ValueError("CLIP gives features that are 0, NaN or infinite")
    return vectors / lengths


def square(images: np.ndarray, side: int) -> np.ndarray:
    """Pictures uint8 (N, H, W, 3) as CLIP saw them in training: uint8 (N, side, side, 3).

    The short side is brought to `side`, bicubically with smoothing (Pillow's, as in OpenAI's and
    transformers' preprocessing), and the middle is cut out of the long one.
    """
    short = min(images.shape[1:3])
    height, width = (side * n // short for n in images.shape[1:3])
    top, left = (height - side) // 2, (width - side) // 2
    if (height, width) == images.shape[1:3]:
        resized = images
    else:
        bicubic = Image.Resampling.BICUBIC
        resized = [np.asarray(Image.fromarray(i).resize((width, height), bicubic)) for i in images]
    return np.stack([i[top : top + side, left : left + side] for i in resized])
