"""What a command does before it loads JAX, and how it ends on bad input."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


def use_huge_pages(*more: str) -> None:
    """Start again with glibc's huge pages on, once: JAX on CPUs faults far fewer pages then.

    glibc reads its settings (more: others) when a process starts, so they cannot be changed from
    inside.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ":".join(["glibc.malloc.hugetlb=1", *more])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def compile_only() -> None:
    """Let the compilers of absent devices run; before JAX is loaded.

    libtpu would look for TPUs, and let only one process at a time have them.
    """
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8",  # any; it is warned of where unset, and not used
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # from which these compilers cannot load
    }


@contextlib.contextmanager
def without(module: str) -> Iterator[None]:
    """Let what is imported in here find that a module is not installed, unless it is loaded."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


FAREWELL = 5  # seconds that worker processes have to end after SIGTERM
STOPPED = "Stopped; the same command goes on from there."


class Stopped(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing takes it for a failure."""


@contextlib.contextmanager
def stoppable(*, agreed: bool = False) -> Iterator[None]:
    """Make SIGTERM an end in order, with a line that says so and no error.

    Where there is something to save, the training loop puts its own handler in place. agreed:
    leave it to JAX, with which several processes agree on the step to stop after.
    """
    if agreed:
        yield
        return

    def stop(_, frame):
        if postponed(stop, frame):
            return
        limit_workers()
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Stopped:
        print(STOPPED)
    else:
        if signal.getsignal(signal.SIGALRM) is stop:  # postponed, and too late; no other's alarm
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGTERM, previous)


def postponed(handler: Callable, frame: FrameType | None) -> bool:
    """Whether an exception raised in this frame would be lost; then the handler is called again.

    Python drops those of callbacks of the garbage collector, and JAX has one: of SIGTERMs that
    reach a busy loop several percent meet it.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    while frame is not None:
        if frame.f_code in callbacks:
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return True
        frame = frame.f_back
    return False


def limit_workers() -> None:
    """Kill the worker processes that are still there in a few seconds.

    Those that read from a disk that hangs, or decode a large batch, would hold up the end for long.
    """
    children = multiprocessing.active_children()

    def kill(*_):
        for child in children:
            child.kill()

    signal.signal(signal.SIGALRM, kill)  # no thread: this one may be about to start one, locked
    signal.alarm(FAREWELL)


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


def fail(error: BaseException) -> int:
    """Print an error in one line; the exit code of bad input."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
