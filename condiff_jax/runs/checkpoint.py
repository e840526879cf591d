"""Checkpoints of the training state; the only file that touches Orbax.

Where the data stand needs no keeping: step i trains on batch number i, see `pipeline.batches`.
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

# Of an array that all devices have, each would write a slice, and a program is compiled for every
# slice. Small arrays are written whole: the first checkpoint of a tiny model took 8 s of compiling.
# (To register another handler would warn, and lose what else this one is set to.)
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20


def abstract_state(objective: Objective, mesh: Mesh) -> state.State:
    """Shapes, types and places of the training state; nothing is allocated."""
    tx = optimizer.create(objective.config)
    shapes = jax.eval_shape(lambda params: state.create(params, tx), objective.shapes)
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(mesh, shapes),
    )


def newest(path: epath.Path) -> int | None:
    """The newest finished step in a folder of checkpoints, None without any; nothing is opened."""
    steps = [int(found.name) for found in path.glob("*") if found.name.isdigit()]
    return max(steps, default=None)


class Checkpoints:
    """The folder of checkpoints: STEP/ holds `state` and `metrics`.

    Written in the background; keeps the newest `checkpoint.keep` and, besides, the
    `checkpoint.keep_best` with the lowest loss. A torn write is never visible as a step.
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
        """Newest finished step, None before the first."""
        return self.manager.latest_step()

    def save(self, step: int, train_state: Any, loss: float) -> None:
        """Start writing step `step`; returns before it is done. A step that exists is kept."""
        if step in self.manager.all_steps():
            return
        self.manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(train_state)),
            metrics={"loss": loss},
            force=True,
        )

    def restore(self, objective: Objective, mesh: Mesh) -> state.State:
        """The newest state, placed on `mesh`, whatever devices it was saved from."""
        target = ocp.args.StandardRestore(abstract_state(objective, mesh))
        return self.manager.restore(self.latest, args=ocp.args.Composite(state=target))["state"]

    def restore_params(
        self, objective: Objective, mesh: Mesh, *, ema: bool = True
    ) -> tuple[int, dict]:
        """(step, parameters) of the newest checkpoint: averaged ones, or the raw ones."""
        if self.latest is None:
            raise ConfigError(str(self.path), "no finished checkpoint here; train first")
        return self.latest, state.to_sample(self.restore(objective, mesh), ema)

    def wait(self) -> None:
        """Block until what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and stop the background threads."""
        self.manager.close()
