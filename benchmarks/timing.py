"""What benchmarks against PyTorch share: their start, methods in turn, and where that was."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import jax
import numpy as np
import torch

from condiff_jax.config.errors import ConfigError
from condiff_jax.runtime import sharding
from condiff_jax.runtime.process import use_huge_pages

PACKAGES = ("jax", "jaxlib", "flax", "torch", "diffusers", "numpy")
# Of glibc: freed memory is kept. Else whoever comes after another must ask the system for it anew,
# which took half of a step's time on a virtual machine, of JAX more than of PyTorch.
KEEP_MEMORY = (
    "glibc.malloc.arena_max=1",
    f"glibc.malloc.mmap_threshold={2**34}",
    f"glibc.malloc.trim_threshold={2**34}",
)
OURS, THEIRS, COMPILED = "ours", "diffusers", "diffusers, torch.compile"


def restart() -> None:
    """Start this command again, once, on the cores of --cores and with KEEP_MEMORY.

    Threads that begin while modules are loaded would have all cores, and glibc reads its settings
    when a process starts.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cores", default="")
    with contextlib.suppress(ConfigError):  # `start` tells
        _take(parser.parse_known_args()[0].cores)
    use_huge_pages(*KEEP_MEMORY)


def _take(cores: str) -> None:
    try:
        if cores:
            os.sched_setaffinity(0, map(int, cores.split(",")))
    except (ValueError, OSError):
        found = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigError("--cores", f"must be among {found}, got {cores}") from None


def start(cores: str) -> bool:
    """Run on these cores, as in "0,1", or on all; whether JAX's device is a GPU.

    Before JAX's first use. ConfigError for cores that are not there, or if PyTorch lacks that GPU.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    _take(cores)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    diffusers.utils.logging.set_verbosity_error()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--device", "JAX has a GPU, but PyTorch has none")
    return gpu


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Products of f32 in full precision for float32; else TF32 allowed. The same in both."""
    full = dtype == "float32"
    torch.set_float32_matmul_precision("highest" if full else "high")
    torch.backends.cudnn.allow_tf32 = not full
    with jax.default_matmul_precision("highest" if full else "default"):
        yield


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device, which is what PyTorch has."""
    return sharding.create_mesh(devices=jax.devices()[:1])


def warm_up(methods: dict[str, Callable]) -> tuple[dict, dict[str, str]]:
    """What each method makes, and why those that do not run were left out of `methods`."""
    made, left_out = {}, {}
    for name in list(methods):
        try:
            made[name] = methods[name]()
        except Exception as error:
            # torch.compile needs a compiler and a Python that it knows.
            if name != COMPILED or len(methods) == 1:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del methods[name]
    return made, left_out


def measure(methods: dict[str, Callable], repetitions: int) -> dict[str, np.ndarray]:
    """Seconds of time and of CPU time, (repetitions, 2) of each method, which take turns."""
    seconds = {name: [] for name in methods}
    for _ in range(repetitions):
        for name, run in methods.items():
            begun, used = time.perf_counter(), time.process_time()
            run()
            seconds[name].append((time.perf_counter() - begun, time.process_time() - used))
    return {name: np.array(values) for name, values in seconds.items()}


def surroundings() -> dict:
    """Where and with what this was measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": models[0] if models else platform.processor(),
        "cores": sorted(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load": os.getloadavg(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit.stdout.strip(),
    }
