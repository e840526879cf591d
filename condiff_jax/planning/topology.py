"""TPU slices and GPU machines that are not attached, described for ahead-of-time compilation."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from importlib import resources
from typing import Any

from jax.experimental import topologies

from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.runtime.flops import CHIPS, Chip

DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # of a slice's grid of chips
CORES = {"v4": 2, "v5p": 2}  # per chip, for kinds whose slice names count cores
GPUS = ("a100", "h100")  # described in gpu_targets/
KNOWN = (
    "v5e:8x8 or v5e-64, v6e:4x8 or v6e-32, v4:2x2x4 or v4-32, v5p:2x2x4 or v5p-32, h100:1x8 and "
    "a100:2x8 (machines x GPUs)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind in a grid: the chips of a slice, or machines x GPUs."""

    name: str
    kind: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """The vendor's figures of one device."""
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs; else they are NVIDIA GPUs."""
        return self.kind in DIMENSIONS

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.grid)

    def devices(self) -> list[Any]:
        """Create devices to compile for, with JAX_PLATFORMS=cpu; ConfigError without a compiler."""
        package, extra = ("libtpu", "tpu") if self.is_tpu else ("jax_cuda12_plugin", "cuda12")
        if not importlib.util.find_spec(package):
            raise ConfigError(
                "--topology",
                f"{self.name} needs a compiler that is not installed here; run pip install -e "
                f'".[{extra}]"',
            )
        grid = "x".join(map(str, self.grid))
        if self.is_tpu:
            options = {"chip_config_name": "megacore"} if self.kind == "v4" else {}
            if self.size == 1:  # less than a whole host
                options["chips_per_host_bounds"] = (1, 1, 1)
            description = {"platform": "tpu", "topology_name": f"{self.kind}:{grid}"} | options
        else:
            target = resources.files("condiff_jax.planning") / "gpu_targets" / f"{self.kind}.txtpb"
            description = {
                "platform": "cuda", "topology_name": "", "target_config": target.read_text(),
                "topology": f"1x{grid}",
            }  # fmt: skip
        try:
            return topologies.get_topology_desc(**description).devices
        except Exception as error:  # the compilers' errors have no common type
            raise ConfigError("--topology", f"{self.name}: {one_line(error)}") from error


def near_square(size: int, dimensions: int) -> tuple[int, ...]:
    """Return the usual grid of 2^k chips, whose sides differ at most by a factor of two."""
    power = size.bit_length() - 1
    sides = sorted(2 ** (power // dimensions + (i < power % dimensions)) for i in range(dimensions))
    return tuple(sides[1:] + sides[:1]) if sides[0] == 1 else tuple(sides)  # 2x2x1, not 1x2x2


def parse(name: str) -> Topology:
    """Parse KIND:GRID, or KIND-NUMBER as in Google's accelerator types; ConfigError if neither."""
    unknown = ConfigError("--topology", f"{name!r} is unknown; examples: {KNOWN}")
    if grid := re.fullmatch(r"([a-z]+[0-9]+[a-z]?):([1-9][0-9]*(?:x[1-9][0-9]*)*)", name):
        sides = tuple(int(side) for side in grid[2].split("x"))
        if grid[1] not in (*DIMENSIONS, *GPUS) or len(sides) != DIMENSIONS.get(grid[1], 2):
            raise unknown
        return Topology(name, grid[1], sides)
    if count := re.fullmatch(r"(v[0-9][a-z]?)-([1-9][0-9]*)", name.replace("v5litepod", "v5e")):
        kind = count[1]
        chips, rest = divmod(int(count[2]), CORES.get(kind, 1))
        if kind in DIMENSIONS and not rest and chips.bit_count() == 1:
            return Topology(name, kind, near_square(chips, DIMENSIONS[kind]))
    raise unknown


def parse_all(names: str) -> list[Topology]:
    """Parse a comma-separated list; ConfigError where a name is unknown or the list is empty."""
    return [parse(name.strip()) for name in names.split(",")]
