"""The training state: f32 parameters, their moving average, optimizer state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class State:
    """step () int32 counts finished updates; ema has the structure of params."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(params: Any, tx: optax.GradientTransformation) -> State:
    """State before the first update; the average starts at the parameters."""
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # donation needs buffers of its own
        opt_state=tx.init(params),
    )


def to_sample(state: State, ema: bool) -> Any:
    """The parameters to sample with: averaged, or as trained (`sampling.ema`)."""
    return state.ema if ema else state.params


def ema_decay(step: jax.Array, decay: float, warmup: bool) -> jax.Array:
    """Decay of update `step` (from 0): `decay`, or (1 + step) / (10 + step) while that is lower."""
    ramp = (1.0 + step) / (10.0 + step)
    return jnp.minimum(decay, ramp) if warmup else jnp.asarray(decay)


def update(
    state: State, grads: Any, tx: optax.GradientTransformation, *, ema: float, ema_warmup: bool
) -> State:
    """The state after one optimizer step with `grads`."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, ema, ema_warmup)
    average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)
    return State(state.step + 1, params, average, opt_state)
