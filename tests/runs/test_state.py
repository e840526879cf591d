"""The training state: its EMA, and which parameters are sampled."""

import jax.numpy as jnp
import numpy as np

from condiff_jax.runs import optimizer, state
from tests import tiny


def test_ema_follows_its_recursion():
    tx = optimizer.create(tiny.config(**{"optimizer.learning_rate": 0.1}))
    now = state.create({"w": jnp.ones(3)}, tx)
    average = np.ones(3)
    for step in range(5):
        now = state.update(now, {"w": jnp.ones(3)}, tx, ema=0.4, ema_warmup=True)
        decay = min(0.4, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(now.params["w"])
        np.testing.assert_allclose(now.ema["w"], average, rtol=1e-6)
    assert int(now.step) == 5
    assert state.to_sample(now, True) is now.ema and state.to_sample(now, False) is now.params
    assert float(state.ema_decay(jnp.array(0), 0.9, False)) == np.float32(0.9)
