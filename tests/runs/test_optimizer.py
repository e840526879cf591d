"""Optimizers: learning-rate schedules, and Adam on clipped gradients."""

import jax.numpy as jnp
import numpy as np
import pytest

from condiff_jax.runs import optimizer
from tests import tiny


def test_learning_rates():
    rate = optimizer.learning_rate(tiny.config(**{"optimizer.warmup": 4}))
    rates = [rate(i) for i in (0, 1, 3, 4, 99)]
    np.testing.assert_allclose(rates, [25e-5, 5e-4, 1e-3, 1e-3, 1e-3], rtol=1e-6)
    cosine = {"optimizer.schedule": "cosine", "optimizer.warmup": 2}
    rate = optimizer.learning_rate(tiny.config(steps=12, **cosine))
    np.testing.assert_allclose([rate(i) for i in (2, 7, 12)], [1e-3, 5e-4, 0], atol=1e-9)
    for warmup in (0, 4):
        rsqrt = {"optimizer.schedule": "rsqrt", "optimizer.decay_after": 25}
        rate = optimizer.learning_rate(tiny.config(**rsqrt, **{"optimizer.warmup": warmup}))
        rates = [rate(i) for i in (5, 25, 100, 2500)]
        np.testing.assert_allclose(rates, [1e-3, 1e-3, 5e-4, 1e-4], rtol=1e-6)


# Norms far above 1 (with a second entry below 1), below 1, and above 1.
GRADIENTS = np.array([[30.0, 0.4], [0.3, 0.4], [0.6, -8.0]])


@pytest.mark.parametrize("name, decay", [("adam", 0.0), ("adamw", 0.1)])
@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_adam_sees_gradients_of_a_bounded_norm(name, decay, bound):
    """Several updates, because Adam's first one is the same for gradients of any norm."""
    fields = {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "weight_decay": decay, "clip_norm": bound}
    fields = {f"optimizer.{key}": value for key, value in {**fields, "name": name}.items()}
    tx = optimizer.create(tiny.config(**fields))
    params = {"a": jnp.array([2.0]), "b": jnp.array([3.0])}  # one norm over all of them
    state, mean, square = tx.init(params), np.zeros(2), np.zeros(2)
    for i, gradient in enumerate(GRADIENTS, 1):
        grads = {"a": jnp.array(gradient[:1]), "b": jnp.array(gradient[1:])}
        updates, state = tx.update(grads, state, params)
        if bound:
            gradient = gradient * min(1, bound / np.linalg.norm(gradient))
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.99 * square + 0.01 * gradient**2
        step = mean / (1 - 0.9**i) / (np.sqrt(square / (1 - 0.99**i)) + 1e-8)
        expected = -1e-3 * (step + decay * np.array([2.0, 3.0]))
        update = np.concatenate([updates["a"], updates["b"]])
        np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-9)
