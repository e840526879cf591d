"""The train step: a pure function, and its compilation for a mesh."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from condiff_jax.objectives.base import Objective
from condiff_jax.runs import optimizer, state
from condiff_jax.runs.checkpoint import abstract_state
from condiff_jax.runtime import sharding


def accumulated(value_and_grad: Callable, params: dict, inputs, parts: int):
    """Mean of value_and_grad over `parts` equal parts of a batch, computed one after the other.

    Part j takes every parts-th example, so that each part is sharded over all devices.
    """
    if parts == 1:
        return value_and_grad(params, *inputs)
    inputs = jax.tree.map(
        lambda a: a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1), inputs
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

    first = jax.tree.map(lambda a: a[0], inputs)
    shapes = jax.eval_shape(value_and_grad, params, *first)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda a: a / parts, total)


def train_step(
    train_state: state.State,
    batch: dict,
    frozen: dict | None = None,
    *,
    objective: Objective,
    tx: optax.GradientTransformation,
) -> tuple[state.State, dict]:
    """Do one update; pure, to be jitted. The noise of step i is drawn from (config.seed, i).

    frozen: parameters that are not trained, see `Objective.load_frozen`. Returns the new state and
    the metrics.
    """
    settings = objective.config.optimizer
    key = jax.random.fold_in(jax.random.key(objective.config.seed), train_state.step)
    noise = objective.draw_noise(key, batch["label"].shape[0], train_state.step)
    value_and_grad = jax.value_and_grad(partial(objective.loss, frozen=frozen), has_aux=True)
    (mean, parts), grads = accumulated(
        value_and_grad, train_state.params, (batch, noise), settings.accumulate
    )
    metrics = {
        **parts,
        "loss": mean,
        "grad_norm": optax.global_norm(grads),
        "broken": batch["broken"].sum(),
    }
    train_state = state.update(
        train_state, grads, tx, ema=settings.ema, ema_warmup=settings.ema_warmup
    )
    return train_state, metrics


def compile_step(objective: Objective, mesh: Mesh):
    """Return jitted (init, step) for a mesh.

    init(key) -> `State`. step(state, batch, frozen) -> (state, metrics); the state is donated.
    """
    tx = optimizer.create(objective.config)
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(objective, mesh))
    init = jax.jit(lambda key: state.create(objective.init(key), tx), out_shardings=shardings)
    step = jax.jit(
        sharding.traced_on(mesh, partial(train_step, objective=objective, tx=tx)),
        in_shardings=(shardings, sharding.batch_sharding(mesh), None),  # None: as they are
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    return init, step
