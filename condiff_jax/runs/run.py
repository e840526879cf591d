"""A trained run, read from its work directory."""

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
    """What a work directory holds at its newest checkpoint; each part is read when first used.

    ema: whether `params` are the EMA parameters. ConfigError where a part is missing or damaged.
    """

    folder: Workdir
    config: Config
    ema: bool
    mesh: Mesh

    @cached_property
    def objective(self) -> Objective:
        """The modules; nothing is allocated."""
        return create_objective(self.config, self.folder.load_vocabulary())

    @cached_property
    def checkpoints(self) -> Checkpoints:
        """The folder of checkpoints, for reading."""
        return Checkpoints(self.folder.checkpoints, self.config)

    @property
    def step(self) -> int:
        """The newest finished step."""
        if self.checkpoints.latest is None:
            raise ConfigError(str(self.folder.checkpoints), "no finished checkpoint; train first")
        return self.checkpoints.latest

    @cached_property
    def params(self) -> dict:
        """The trained parameters at `step`, by network, placed on the mesh."""
        return self.checkpoints.restore_params(self.objective, self.mesh, ema=self.ema)[1]

    @cached_property
    def frozen(self) -> dict:
        """The parameters that are not trained, by network, placed on the mesh."""
        return sharding.put(self.mesh, self.folder.load_frozen(self.objective))


def load(
    workdir: str,
    config: Config | None = None,
    *,
    objective: str = "diffusion",
    ema: bool | None = None,
    mesh: Mesh | None = None,
) -> Run:
    """The run in a work directory; ConfigError where there is none, or one of another objective.

    config: with other values of fields that may differ, such as those of `sampling`; ConfigError
    where it differs in what was trained. ema: default `config.sampling.ema`. mesh: default all
    devices, as `config.parallel` says.
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
