"""Per-device memory, collectives and cycles of a compiled program.

libtpu optimizes a program of XL size in a minute or less; its memory and collectives are known
then. Cycle estimates need code generation, which takes many times as long. `measure_early` stops
the compiler in between, and reads the files that XLA has written to xla_dump_to by then.
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

# XLA autotunes Triton's matrix products on a GPU; without one it may choose tiles that do not
# compile.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": "False"}
POLL_INTERVAL = 0.2  # seconds
HBM = re.compile(r"Memory Space: default \(color=0\)\nTotal bytes: (\d+)")


class MemoryEstimate(NamedTuple):
    """Per-device memory of a compiled program, and its instructions.

    inputs: bytes of the sharded input arrays, by group. temporary: bytes of everything else except
    the code; infinite where the program does not fit. runs: see `hlo.executions`. complete: False
    where cycle estimates are missing.
    """

    inputs: dict[str, int]
    temporary: float
    runs: list[hlo.Run]
    complete: bool = True

    @property
    def total(self) -> float:
        """Bytes of inputs and temporaries."""
        return sum(self.inputs.values()) + self.temporary


def device_bytes(tree: Any) -> int:
    """Return the bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in leaves)


def measure(
    lowered: Any, inputs: dict[str, Any], options: dict[str, Any] | None = None, dump: str = ""
) -> MemoryEstimate:
    """Compile a program for its devices; libtpu stops early on a program that does not fit.

    inputs: ShapeDtypeStructs with shardings, by group. options: of XLA. dump: a folder for XLA's
    files, for TPUs, whose `memory_analysis` counts fragmentation twice.
    """
    sizes = {name: device_bytes(tree) for name, tree in inputs.items()}
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
    if dump and (optimized := _optimized_program(Path(dump))):
        total = optimized[0]
    return MemoryEstimate(sizes, total - sum(sizes.values()), hlo.executions(compiled.as_text()))


def measure_early(lower: Callable[..., tuple[Any, dict[str, Any]]], *arguments) -> MemoryEstimate:
    """Return `measure(*lower(*arguments))` of a program for TPUs, without cycle estimates.

    Compiles in a process that is killed once memory and collectives are known, so that the function
    and its arguments must be picklable. Errors are raised here. Compiles to the end where libtpu
    names its files differently than version 0.0.42.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        process = context.Process(
            target=_compile, args=(sender, folder, lower, arguments), daemon=True
        )
        process.start()
        sender.close()
        try:
            sizes = _receive(receiver)
            while not receiver.poll(POLL_INTERVAL):
                if optimized := _optimized_program(Path(folder)):
                    total, text = optimized
                    runs = hlo.executions(text)
                    temporary = total - sum(sizes.values())
                    return MemoryEstimate(sizes, temporary, runs, complete=False)
            return _receive(receiver)
        finally:
            process.kill()
            process.join()
            receiver.close()


def _compile(sender: Any, folder: str, lower: Callable, arguments: tuple) -> None:
    """Send the sizes of the program's inputs and, at the end, its estimate; or an error."""
    follow_parent()  # without its parent this process would go on compiling for an hour
    try:
        lowered, inputs = lower(*arguments)
        sender.send({name: device_bytes(tree) for name, tree in inputs.items()})
        sender.send(measure(lowered, inputs, dump=folder))
    except ConfigError as error:
        sender.send(error)
    except Exception as error:  # a compiler error may not be picklable
        sender.send(RuntimeError(one_line(error)))


def _receive(receiver: Any) -> Any:
    """Receive a value from `_compile`; raise it if it is an error."""
    try:
        value = receiver.recv()
    except EOFError:
        raise RuntimeError("the compiler process ended early, perhaps out of memory") from None
    if isinstance(value, Exception):
        raise value
    return value


def _optimized_program(folder: Path) -> tuple[int, str] | None:
    """Read (bytes of memory, HLO text) once the compiler has found that the memory suffices."""
    suffix = "after_optimizations_after_buffer_assignment.txt"
    for path in folder.glob(f"*.{suffix}"):
        prefix = path.name.removesuffix(suffix)
        report = folder / f"{prefix}after_optimizations-memory-usage-report.txt"
        text = folder / f"{prefix}after_optimizations.txt"
        if report.exists() and text.exists() and (memory := HBM.search(report.read_text())):
            return int(memory[1]), text.read_text()
    return None
