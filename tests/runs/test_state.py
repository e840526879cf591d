"""The training state: its EMA, and which parameters are sampled."""

import jax.numpy as jnp
import numpy as np

from condiff_jax.runs import optimizer, state
from tests import tiny


def test_ema_follows_its_recursion():
    tx = optimizer.create(tiny.config(**{"optimizer.learning_rate": 0.1}))
    current = state.create({"w": jnp.ones(3)}, tx)
    ema = np.ones(3)
    for step in range(5):
        current = state.update(current, {"w": jnp.ones(3)}, tx, ema=0.4, ema_warmup=True)
        decay = min(0.4, (1 + step) / (10 + step))
        ema = decay * ema + (1 - decay) * np.asarray(current.params["w"])
        np.testing.assert_allclose(current.ema["w"], ema, rtol=1e-6)
    assert int(current.step) == 5
    assert state.to_sample(current, True) is current.ema
    assert state.to_sample(current, False) is current.params
    assert float(state.ema_decay(jnp.array(0), 0.9, False)) == np.float32(0.9)
