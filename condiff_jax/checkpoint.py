"""Checkpoints of training state and data position; the only file that touches Orbax."""

from __future__ import annotations

from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from condiff_jax import optim, sharding, state
from condiff_jax.config import Config, ConfigError
from condiff_jax.system import System


def abstract_state(system: System, mesh: Mesh) -> state.State:
    """Shapes, types and places of the training state; nothing is allocated."""
    tx = optim.create(system.config)
    shapes = jax.eval_shape(lambda key: state.create(system.init(key), tx), jax.random.key(0))
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(mesh, shapes),
    )


class Checkpoints:
    """The folder of checkpoints: STEP/ holds `state`, `data` (position) and `metrics`.

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
            raise ConfigError(f"{path}: no checkpoints here; train first")
        self.manager = ocp.CheckpointManager(
            path.resolve() if "://" not in str(path) else path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                create=create,
                cleanup_tmp_directories=create,
                read_only=not create,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": grain.checkpoint.CheckpointHandler(),
            },
        )

    @property
    def latest(self) -> int | None:
        """Newest finished step, None before the first."""
        return self.manager.latest_step()

    def save(self, step: int, train_state: Any, data: Any, loss: float) -> None:
        """Start writing step `step`; returns before it is done. A step that exists is kept.

        data: the iterator, or None for a state that no data has led to.
        """
        if step in self.manager.all_steps():
            return
        items = {"state": ocp.args.StandardSave(train_state)}
        if data is not None:
            items["data"] = grain.checkpoint.CheckpointSave(data)
        self.manager.save(
            step,
            args=ocp.args.Composite(**items),
            metrics={"loss": loss},
            force=True,
        )

    def restore(self, system: System, mesh: Mesh, data: Any) -> state.State:
        """The newest state, placed on `mesh`, and the data iterator moved to its position."""
        items = {"state": ocp.args.StandardRestore(abstract_state(system, mesh))}
        if (self.path / str(self.latest) / "data").exists():  # an import has none
            items["data"] = grain.checkpoint.CheckpointRestore(data)
        return self.manager.restore(self.latest, args=ocp.args.Composite(**items))["state"]

    def restore_params(self, system: System, mesh: Mesh, *, ema: bool = True) -> tuple[int, dict]:
        """(step, parameters) of the newest checkpoint: averaged ones, or the raw ones."""
        if self.latest is None:
            raise ConfigError(f"{self.path}: no finished checkpoint here; train first")
        restored = self.manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state(system, mesh)),
            ),
        )["state"]
        return self.latest, state.to_sample(restored, ema)

    def wait(self) -> None:
        """Block until what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Finish writing and stop the background threads."""
        self.manager.close()
