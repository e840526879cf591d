"""Trained runs, loaded from their work directories."""

from __future__ import annotations

import dataclasses
from functools import cached_property

from jax.sharding import Mesh

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.registry import create_objective
from condiff_jax.runs.checkpoint import Checkpoints
from condiff_jax.runs.workdir import Workdir
from condiff_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Run:
    """Trained run at its newest checkpoint; each part is loaded on first use.

    ema: whether `params` are the EMA parameters. ConfigError where a part is missing or damaged.
    """

    folder: Workdir
    config: Config
    ema: bool
    mesh: Mesh

    @cached_property
    def objective(self) -> Objective:
        """The objective with its modules; no parameters are allocated."""
        return create_objective(self.config, self.folder.load_vocabulary())

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The checkpoint folder, opened for reading."""
        return Checkpoints(self.folder.checkpoints, self.config)

    @property
    def step(self) -> int:
        """The newest finished step."""
        if self.checkpoints.latest is None:
            raise ConfigError(str(self.folder.checkpoints), "no finished checkpoint; train first")
        return self.checkpoints.latest

    @cached_property
    def params(self) -> dict:
        """The trained parameters at `step`, by network, sharded on the mesh."""
        return self.checkpoints.restore_params(self.objective, self.mesh, ema=self.ema)[1]

    @cached_property
    def frozen(self) -> dict:
        """The parameters of frozen networks, by network, sharded on the mesh."""
        return sharding.put(self.mesh, self.folder.load_frozen(self.objective))


def load(
    workdir: str,
    config: Config | None = None,
    *,
    objective: str = "diffusion",
    ema: bool | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """Load the run of a work directory; ConfigError for no run, or one of another objective.

    config: may differ from the run's in fields that do not affect training, such as those of
    `sampling`; ConfigError where it differs in others. ema: default `config.sampling.ema`. mesh:
    default all devices, according to `config.parallel`.
    """
    folder = Workdir(workdir)
    if config is None:
        config = folder.load_config()
    else:
        folder.check(config)
    if config.objective != objective:
        raise ConfigError(
            "objective", f"{workdir} has trained {config.objective}, where {objective} is needed"
        )
    ema = config.sampling.ema if ema is None else ema
    return Run(folder, config, ema, mesh or sharding.create_mesh(config.parallel.fsdp))
