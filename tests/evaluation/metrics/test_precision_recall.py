"""Precision and recall by their definition, and for known sets."""

import numpy as np
import pytest

from condiff_jax.evaluation.metrics import precision_recall as module
from condiff_jax.evaluation.metrics.precision_recall import precision_recall


def features(n, seed, shift=0.0, width=4):
    return np.random.default_rng(seed).normal(shift, 1, (n, width)).astype(np.float32)


def by_definition(generated, reference, k):
    def distances(a, b):
        a, b = (x.astype(np.float64) for x in (a, b))
        return np.linalg.norm(a[:, None] - b[None], axis=-1)

    def share(points, centers):
        radii = np.sort(distances(centers, centers), axis=1)[:, k]  # column 0 is the point itself
        return float((distances(points, centers) <= radii).any(1).mean())

    return {"precision": share(generated, reference), "recall": share(reference, generated)}


@pytest.mark.parametrize("block", [1024, 16])
@pytest.mark.parametrize("k", [1, 3])
def test_equals_the_definition(monkeypatch, block, k):
    monkeypatch.setattr(module, "BLOCK", block)
    generated, reference = features(50, 0), features(37, 1, 0.7)
    expected = by_definition(generated, reference, k)
    assert min(expected.values()) > 0.1 and max(expected.values()) < 0.9
    assert expected["precision"] != expected["recall"]
    assert precision_recall(generated, reference, k) == pytest.approx(expected, abs=1e-6)


def test_what_is_as_far_as_the_neighbor_is_inside():
    # Equal points have balls of radius 0.
    ones, zeros = np.ones((6, 4), np.float32), np.zeros((6, 4), np.float32)
    both = np.concatenate([ones, zeros])
    assert precision_recall(ones, both) == {"precision": 1, "recall": 0.5}


def test_numbers_of_torch_fidelity():
    # prc_features_to_metric of torch-fidelity 0.4.0.
    values = precision_recall(features(80, 0, 0.0, 8), features(90, 1, 0.5, 8))
    assert values == pytest.approx({"precision": 0.75, "recall": 70 / 90}, abs=1e-6)


def test_known_sets():
    x = features(20, 0)
    assert precision_recall(x, x) == {"precision": 1, "recall": 1}
    assert precision_recall(x, x + 100) == {"precision": 0, "recall": 0}
    # One mode of two is generated: all generated features are real, half of the real ones covered.
    both = np.concatenate([x, x + 100])
    assert precision_recall(x, both) == {"precision": 1, "recall": 0.5}


def test_distances_are_precise_far_from_the_origin():
    generated, reference = features(50, 0), features(50, 1)
    near = precision_recall(generated, reference)
    assert precision_recall(generated + 1000, reference + 1000) == pytest.approx(near, abs=0.041)


def test_bad_input():
    for n, m in ((3, 9), (9, 3)):
        with pytest.raises(ValueError, match=f"more than 3 images each, got {n} and {m}"):
            precision_recall(features(n, 0), features(m, 1))
    with pytest.raises(ValueError, match="features must be"):
        precision_recall(features(6, 0)[:, :3], features(6, 1))
