"""Training state: f32 parameters, their EMA and the optimizer state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class State:
    """Training state; step () int32 counts finished updates, ema has the structure of params."""

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any


def create(params: Any, tx: optax.GradientTransformation) -> State:
    """Create the state before the first update; the EMA starts at the parameters."""
    return State(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),  # donation needs separate buffers
        opt_state=tx.init(params),
    )


def to_sample(state: State, ema: bool) -> Any:
    """Return the parameters to sample with (`sampling.ema`): the EMA or the raw parameters."""
    return state.ema if ema else state.params


def ema_decay(step: jax.Array, decay: float, warmup: bool) -> jax.Array:
    """Return the EMA decay of update `step` (from 0): `decay`; with warmup at most a ramp.

    The ramp is (1 + step) / (10 + step).
    """
    ramp = (1.0 + step) / (10.0 + step)
    return jnp.minimum(decay, ramp) if warmup else jnp.asarray(decay)


def update(
    state: State, grads: Any, tx: optax.GradientTransformation, *, ema: float, ema_warmup: bool
) -> State:
    """Return the state after one optimizer step with `grads`."""
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(state.step, ema, ema_warmup)
    new_ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, params)
    return State(state.step + 1, params, new_ema, opt_state)
