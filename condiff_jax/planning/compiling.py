"""What a program needs of each device, as its compiler tells.

libtpu optimises a program of XL size in a minute or less, and then knows its memory and what it
sends. To generate the code takes it many times as long, and that alone tells cycles. `early` stops
it in between: what is known by then is in the files that XLA writes where xla_dump_to says.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.data.workers import follow_parent
from condiff_jax.planning import hlo

# XLA tunes Triton's matrix products on a GPU; without one it can choose tiles that do not compile.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": "False"}
POLL = 0.2  # seconds
HBM = re.compile(r"Memory Space: default \(color=0\)\nTotal bytes: (\d+)")


class MemoryEstimate(NamedTuple):
    """What a program needs of each device.

    given: bytes of the arrays that it is given, as they are placed, by what they are. temporary: of
    all else but the program's code; infinite where the compiler gave up. runs: see
    `hlo.executions`. whole: nothing more can be known; else cycles are missing.
    """

    given: dict[str, int]
    temporary: float
    runs: list[hlo.Run]
    whole: bool = True

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self.given.values()) + self.temporary


def device_bytes(tree: Any) -> int:
    """Bytes of the placed ShapeDtypeStructs of a tree on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def measure(
    lowered: Any, given: dict[str, Any], options: dict[str, Any] | None = None, dump: str = ""
) -> MemoryEstimate:
    """Compile a program for its devices; libtpu gives up, early, on one that does not fit.

    given: placed ShapeDtypeStructs. options: of XLA. dump: a folder for XLA's files, for TPUs,
    whose figures in `memory_analysis` count fragmentation twice.
    """
    sizes = {name: device_bytes(tree) for name, tree in given.items()}
    files = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True} if dump else {}
    try:
        compiled = lowered.compile(compiler_options={**(options or {}), **files})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return MemoryEstimate(sizes, math.inf, [])
    memory = compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )  # fmt: skip
    if dump and (found := _optimized(Path(dump))):
        total = found[0]
    return MemoryEstimate(sizes, total - sum(sizes.values()), hlo.executions(compiled.as_text()))


def early(lower: Callable[..., tuple[Any, dict[str, Any]]], *inputs) -> MemoryEstimate:
    """`measure(*lower(*inputs))` of a program for TPUs, but for its cycles.

    In a process of its own, which is ended once enough is known: the function and what it takes
    must be picklable. What it raises is raised here. Where libtpu's files have other names than
    those of version 0.0.42, it compiles to the end.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (theirs, folder, lower, inputs)
        process = context.Process(target=_compile, args=arguments, daemon=True)
        process.start()
        theirs.close()
        try:
            sizes = _receive(ours)
            while not ours.poll(POLL):
                if found := _optimized(Path(folder)):
                    total, text = found
                    runs = hlo.executions(text)
                    return MemoryEstimate(sizes, total - sum(sizes.values()), runs, whole=False)
            return _receive(ours)
        finally:
            process.kill()
            process.join()
            ours.close()


def _compile(pipe: Any, folder: str, lower: Callable, inputs: tuple) -> None:
    """Send the sizes of what the program is given and, in the end, its needs; or an error."""
    follow_parent()  # this process would compile on for an hour
    try:
        lowered, given = lower(*inputs)
        pipe.send({name: device_bytes(tree) for name, tree in given.items()})
        pipe.send(measure(lowered, given, dump=folder))
    except ConfigError as error:
        pipe.send(error)
    except Exception as error:  # of the compiler, which may not be picklable
        pipe.send(RuntimeError(one_line(error)))


def _receive(pipe: Any) -> Any:
    try:
        found = pipe.recv()
    except EOFError:
        raise RuntimeError("the compiler's process has ended early, for want of memory?") from None
    if isinstance(found, Exception):
        raise found
    return found


def _optimized(folder: Path) -> tuple[int, str] | None:
    """(bytes of memory, text) of the program, once the compiler has taken memory to be enough."""
    last = "after_optimizations_after_buffer_assignment.txt"
    for path in folder.glob(f"*.{last}"):
        begins = path.name.removesuffix(last)
        report = folder / f"{begins}after_optimizations-memory-usage-report.txt"
        text = folder / f"{begins}after_optimizations.txt"
        if report.exists() and text.exists() and (found := HBM.search(report.read_text())):
            return int(found[1]), text.read_text()
    return None
