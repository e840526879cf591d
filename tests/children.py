"""Run `python -m condiff_jax.main` in child processes without importing JAX each time.

A server process imports all modules once, and forks a child for each command line.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from tests.compiling import QUICK, collect_rarely

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preload"])


def _main(arguments: Sequence[str], log: str, devices: int, environment: dict[str, str]) -> None:
    """Run `python -m condiff_jax.main ARGUMENTS >LOG 2>&1` with few layers, and MB = 1000."""
    os.setsid()  # a process group of its own, as under a job manager
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1) for fd in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    sys.argv = ["condiff_jax", *arguments]
    from absl import app, logging

    from condiff_jax import main
    from condiff_jax.training import encode
    from tests import tiny

    logging.set_verbosity(logging.WARNING)
    collect_rarely()
    with tiny.few_layers(), mock.patch.object(encode, "MB", 1000):
        app.run(main.main, flags_parser=main.parse)


class Children:
    """n processes of one distributed run, or a single one, that log to files.

    devices: number of devices of each process.
    """

    def __init__(
        self, arguments: Sequence[str], log: Path, *, n: int = 1, devices: int = 1, **environment
    ):
        self.logs = [Path(f"{log}.{i}") for i in range(n)]
        self.processes = []
        port = free_port()
        for i, path in enumerate(self.logs):
            flags = list(arguments)
            if n > 1:
                flags += [f"--coordinator=localhost:{port}", f"--processes={n}", f"--process={i}"]
            self.processes.append(
                CONTEXT.Process(target=_main, args=(flags, str(path), devices, environment))
            )
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> list[int]:
        """Wait and return the exit codes; negative ones are signals. TimeoutError has the log."""
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(seconds)
            if process.exitcode is None:
                raise TimeoutError(f"{log} after {seconds} s: {log.read_text()[-2000:]}")
        return [process.exitcode for process in self.processes]

    def group(self, i: int = 0) -> list[int]:
        """Running processes of the process group of process i, including itself."""
        pids = []
        leader = self.processes[i].pid
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # the process may have just ended
                state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
                if int(group) == leader and state != "Z":
                    pids.append(int(path.parent.name))
        return pids

    def outputs(self) -> list[str]:
        """Output of each process so far."""
        return [log.read_text() for log in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ValueError):
                process.kill()
                process.join()


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
