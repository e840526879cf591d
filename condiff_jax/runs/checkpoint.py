"""Checkpoints of the training state; the only file that uses Orbax.

The position in the data is not stored: step i trains on batch i, see `pipeline.batches`.
"""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.objectives.base import Objective
from condiff_jax.runs import optimizer, state
from condiff_jax.runtime import sharding

# By default each device writes a slice of a replicated array, and each slice compiles a program,
# which took 8 s for the first checkpoint of a tiny model. Arrays below this size are written whole.
# (Registering another handler would warn, and lose the other settings of this one.)
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20


def abstract_state(objective: Objective, mesh: Mesh) -> state.State:
    """Return shapes, types and shardings of the training state without allocating it."""
    tx = optimizer.create(objective.config)
    shapes = jax.eval_shape(lambda params: state.create(params, tx), objective.shapes)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(mesh, shapes),
    )


def newest(path: epath.Path) -> int | None:
    """Return the newest finished step of a checkpoint folder by its file names; None if empty."""
    steps = [int(folder.name) for folder in path.glob("*") if folder.name.isdigit()]
    return max(steps, default=None)


class Checkpoints:
    """Checkpoint folder of a run: STEP/ holds `state` and `metrics`.

    Written in the background. Keeps the newest `checkpoint.keep` and the `checkpoint.keep_best`
    with the lowest loss. An interrupted write is never visible as a step.
    """

    def __init__(self, path: epath.Path, config: Config, *, create: bool = False):
        self.path = path
        settings = config.checkpoint
        policies = [ocp.checkpoint_managers.LatestN(settings.keep)]
        if settings.keep_best:
            best = ocp.checkpoint_managers.BestN(
                get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=settings.keep_best
            )
            policies.append(best)
        if not create and not path.exists():
            raise ConfigError(str(path), "no checkpoints here; train first")
        self.manager = ocp.CheckpointManager(
            path.resolve() if "://" not in str(path) else path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                create=create,
                cleanup_tmp_directories=create,
                read_only=not create,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler()},
        )

    @property
    def latest(self) -> int | None:
        """The newest finished step; None before the first."""
        return self.manager.latest_step()

    def save(self, step: int, train_state: Any, loss: float) -> None:
        """Start writing a checkpoint in the background; an existing one of this step stays."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(train_state)),
            metrics={"loss": loss},
            force=True,
        )

    def restore(self, objective: Objective, mesh: Mesh) -> state.State:
        """Restore the newest state with its shardings on `mesh`, whatever devices it came from."""
        target = ocp.args.StandardRestore(abstract_state(objective, mesh))
        return self.manager.restore(self.latest, args=ocp.args.Composite(state=target))["state"]

    def restore_params(
        self, objective: Objective, mesh: Mesh, *, ema: bool = True
    ) -> tuple[int, dict]:
        """Restore (step, parameters) of the newest checkpoint: the EMA or the raw parameters."""
        if self.latest is None:
            raise ConfigError(str(self.path), "no finished checkpoint here; train first")
        return self.latest, state.to_sample(self.restore(objective, mesh), ema)

    def wait(self) -> None:
        """Block until all saved checkpoints are on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and stop the background threads."""
        self.manager.close()
