"""What a command does before it loads JAX, and how it ends on bad input."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator


def use_huge_pages() -> None:
    """Start again with glibc's huge pages on, once: JAX on CPUs faults far fewer pages then.

    glibc reads the setting when a process starts, so it cannot be changed from inside.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


class Stopped(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing takes it for a failure."""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Make SIGTERM an end in order, with a line that says so and no error.

    Where there is something to save, the training loop puts its own handler in place.
    """

    def stop(*_):
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Stopped:
        print("Stopped; the same command goes on from there.")
    finally:
        signal.signal(signal.SIGTERM, previous)


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def fail(error: BaseException) -> int:
    """Print an error in one line; the exit code of bad input."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
