"""Slices and machines that are not here: their devices, to compile for them."""

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

DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # of the grid of a slice's chips
CORES = {"v4": 2, "v5p": 2}  # per chip, where a slice's name counts them and not chips
GPUS = ("a100", "h100")  # that gpu_targets/ describes
KNOWN = (
    "v5e:8x8 or v5e-64, v6e:4x8 or v6e-32, v4:2x2x4 or v4-32, v5p:2x2x4 or v5p-32, h100:1x8 and "
    "a100:2x8 (machines x GPUs)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of one kind and how they are arranged: a slice's chips, or machines x GPUs."""

    name: str
    kind: str
    grid: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        """What the vendor says of one device."""
        return CHIPS[self.kind]

    @property
    def is_tpu(self) -> bool:
        """Else an NVIDIA GPU."""
        return self.kind in DIMENSIONS

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.grid)

    def devices(self) -> list[Any]:
        """To compile for, with JAX_PLATFORMS=cpu; ConfigError where the compiler is missing."""
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
            described = {"platform": "tpu", "topology_name": f"{self.kind}:{grid}"} | options
        else:
            target = resources.files("condiff_jax.planning") / "gpu_targets" / f"{self.kind}.txtpb"
            described = {
                "platform": "cuda", "topology_name": "", "target_config": target.read_text(),
                "topology": f"1x{grid}",
            }  # fmt: skip
        try:
            return topologies.get_topology_desc(**described).devices
        except Exception as error:  # of the compiler; it has no type of its own
            raise ConfigError("--topology", f"{self.name}: {one_line(error)}") from error


def near_square(size: int, dimensions: int) -> tuple[int, ...]:
    """The usual grid of 2^k chips: sides that are equal or the last ones twice the first."""
    power = size.bit_length() - 1
    sides = sorted(2 ** (power // dimensions + (i < power % dimensions)) for i in range(dimensions))
    return tuple(sides[1:] + sides[:1]) if sides[0] == 1 else tuple(sides)  # 2x2x1, not 1x2x2


def parse(name: str) -> Topology:
    """From KIND:GRID or the KIND-NUMBER of Google's accelerator types; ConfigError if neither."""
    wrong = ConfigError("--topology", f"{name!r} is unknown; examples: {KNOWN}")
    if grid := re.fullmatch(r"([a-z]+[0-9]+[a-z]?):([1-9][0-9]*(?:x[1-9][0-9]*)*)", name):
        sides = tuple(int(side) for side in grid[2].split("x"))
        if grid[1] not in (*DIMENSIONS, *GPUS) or len(sides) != DIMENSIONS.get(grid[1], 2):
            raise wrong
        return Topology(name, grid[1], sides)
    if count := re.fullmatch(r"(v[0-9][a-z]?)-([1-9][0-9]*)", name.replace("v5litepod", "v5e")):
        kind = count[1]
        chips, rest = divmod(int(count[2]), CORES.get(kind, 1))
        if kind in DIMENSIONS and not rest and chips.bit_count() == 1:
            return Topology(name, kind, near_square(chips, DIMENSIONS[kind]))
    raise wrong


def parse_all(names: str) -> list[Topology]:
    """From a list separated by commas; ConfigError where one is unknown, or there is none."""
    return [parse(name.strip()) for name in names.split(",")]
