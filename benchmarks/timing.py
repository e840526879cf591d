"""Shared by the benchmarks against PyTorch: start-up, timing of methods in turn, environment."""

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
# Settings of glibc that keep freed memory. By default a method that runs after another has to
# request it from the system again, which took half of a step's time on a virtual machine, more with
# JAX than with PyTorch.
KEEP_MEMORY = (
    "glibc.malloc.arena_max=1",
    f"glibc.malloc.mmap_threshold={2**34}",
    f"glibc.malloc.trim_threshold={2**34}",
)
OURS, THEIRS, COMPILED = "ours", "diffusers", "diffusers, torch.compile"


def restart() -> None:
    """Restart this command, once, on the cores of --cores and with KEEP_MEMORY.

    Threads that start while modules are imported would use all cores, and glibc reads its settings
    when a process starts.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cores", default="")
    with contextlib.suppress(ConfigError):  # `start` reports it
        _set_cores(parser.parse_known_args()[0].cores)
    use_huge_pages(*KEEP_MEMORY)


def _set_cores(cores: str) -> None:
    try:
        if cores:
            os.sched_setaffinity(0, map(int, cores.split(",")))
    except (ValueError, OSError):
        known = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        raise ConfigError("--cores", f"must be among {known}, got {cores}") from None


def start(cores: str) -> bool:
    """Restrict this process to cores such as "0,1"; return whether JAX's device is a GPU.

    "": all cores. Call it before using JAX. ConfigError for cores that do not exist, or if JAX has
    a GPU and PyTorch has none.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory, too
    _set_cores(cores)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    diffusers.utils.logging.set_verbosity_error()
    gpu = jax.default_backend() == "gpu"
    if gpu and not torch.cuda.is_available():
        raise ConfigError("--device", "JAX has a GPU, but PyTorch has none")
    return gpu


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Set full-precision f32 products for dtype float32, else allow TF32; in JAX and PyTorch."""
    exact = dtype == "float32"
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact
    with jax.default_matmul_precision("highest" if exact else "default"):
        yield


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device, the one that PyTorch uses."""
    return sharding.create_mesh(devices=jax.devices()[:1])


def warm_up(methods: dict[str, Callable]) -> tuple[dict, dict[str, str]]:
    """Run each method once: outputs by name, and errors of those removed from `methods`."""
    outputs, left_out = {}, {}
    for name in list(methods):
        try:
            outputs[name] = methods[name]()
        except Exception as error:
            # torch.compile needs a compiler and a supported Python version.
            if name != COMPILED or len(methods) == 1:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            del methods[name]
    return outputs, left_out


def measure(methods: dict[str, Callable], repetitions: int) -> dict[str, np.ndarray]:
    """Wall and CPU seconds (repetitions, 2) of each method; the methods take turns."""
    seconds = {name: [] for name in methods}
    for _ in range(repetitions):
        for name, run in methods.items():
            start_time, start_cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - start_time, time.process_time() - start_cpu
            seconds[name].append((wall, cpu))
    return {name: np.array(values) for name, values in seconds.items()}


def surroundings() -> dict:
    """Hardware, versions and commit of a measurement."""
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
