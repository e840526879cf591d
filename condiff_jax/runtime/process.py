"""Process setup before JAX is imported, SIGTERM handling and exit codes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from types import FrameType

from condiff_jax.config.errors import one_line


def use_huge_pages(*tunables: str) -> None:
    """Restart this process once with glibc's huge pages, which save JAX on CPUs many page faults.

    glibc reads its tunables (`tunables`: more of them) only when a process starts.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ":".join(["glibc.malloc.hugetlb=1", *tunables])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def compile_only() -> None:
    """Set up ahead-of-time compilation for absent devices; to be called before importing JAX.

    By default libtpu would search for TPUs and lock them to one process.
    """
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v4-8",  # unused, but libtpu warns where it is unset
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # these compilers cannot load from it
    }


@contextlib.contextmanager
def hide_module(module: str) -> Iterator[None]:
    """Make a module that is not loaded yet look uninstalled to imports within the block."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None
    try:
        yield
    finally:
        del sys.modules[module]


WORKER_TIMEOUT = 5  # seconds that worker processes have to end after SIGTERM
STOPPED_MESSAGE = "Stopped; the same command goes on from there."


class Stopped(BaseException):
    """SIGTERM arrived; not an Exception, so that no handler of failures catches it."""


@contextlib.contextmanager
def stoppable(*, coordinated: bool = False) -> Iterator[None]:
    """End the block on SIGTERM with one printed line instead of an error.

    The training loop, which has a state to save, installs its own handler. coordinated: leave
    SIGTERM to JAX, through which several processes agree on the step to stop after.
    """
    if coordinated:
        yield
        return

    def stop(_, frame):
        if defer_past_gc(stop, frame):
            return
        kill_workers_later()
        raise Stopped

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Stopped:
        print(STOPPED_MESSAGE)
    else:
        # A deferred `stop` comes too late now; alarms of other handlers stay.
        if signal.getsignal(signal.SIGALRM) is stop:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGTERM, previous)


def defer_past_gc(handler: Callable, frame: FrameType | None) -> bool:
    """Return whether an exception is lost in `frame`; if so, call `handler` again soon.

    Python discards exceptions raised in callbacks of the garbage collector, in finalizers and in
    __del__. JAX installs such a callback: several percent of the SIGTERMs that reach a busy loop
    arrive in it.
    """
    callbacks = [getattr(callback, "__code__", None) for callback in gc.callbacks]
    callbacks.append(weakref.finalize.__call__.__code__)
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return True
        frame = frame.f_back
    return False


def kill_workers_later() -> None:
    """Kill the worker processes that are still alive in WORKER_TIMEOUT seconds.

    Workers that wait for a hanging disk or decode a large batch would delay the exit for long.
    """
    children = multiprocessing.active_children()

    def kill(*_):
        for child in children:
            child.kill()

    # An alarm and not a thread: the main thread may hold the lock for starting threads.
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(WORKER_TIMEOUT)


def fail(error: BaseException | str) -> int:
    """Print an error in one line and return the exit code of bad input."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2
