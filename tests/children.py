"""Command lines of ours in processes of their own, as many as wanted, without loading JAX anew.

A server process has everything imported and forks; what it forks is a fresh `python -m`.
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
    """`python -m condiff_jax.main ARGUMENTS >LOG 2>&1` with few layers, and MB of a kB."""
    os.setsid()  # a group of its own, as job managers give it
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
    """n processes that work as one, or one alone, with so many devices each; they log to files."""

    def __init__(
        self, arguments: Sequence[str], log: Path, *, n: int = 1, devices: int = 1, **environment
    ):
        self.logs, self.processes = [Path(f"{log}.{i}") for i in range(n)], []
        port = free_port()
        for i, path in enumerate(self.logs):
            where = [f"--coordinator=localhost:{port}", f"--processes={n}", f"--process={i}"]
            everything = [*arguments, *(where if n > 1 else [])]
            self.processes.append(
                CONTEXT.Process(target=_main, args=(everything, str(path), devices, environment))
            )
        for process in self.processes:
            process.start()

    def wait(self, seconds: float) -> list[int]:
        """Exit codes; negative ones are signals. TimeoutError names what still runs."""
        for process, log in zip(self.processes, self.logs, strict=True):
            process.join(seconds)
            if process.exitcode is None:
                raise TimeoutError(f"{log} after {seconds} s: {log.read_text()[-2000:]}")
        return [process.exitcode for process in self.processes]

    def group(self, i: int = 0) -> list[int]:
        """The living processes of process i's group, itself among them."""
        found, own = [], self.processes[i].pid
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # it has just ended
                state, _, group = path.read_text().rsplit(")", 1)[1].split()[:3]
                if int(group) == own and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def outputs(self) -> list[str]:
        """What each has written."""
        return [log.read_text() for log in self.logs]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ValueError):
                process.kill()
                process.join()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
