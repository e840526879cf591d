"""Initializers of worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """End this worker process as soon as its parent ends, for whatever reason."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def leave_signals_to_parent(*_) -> None:
    """Ignore SIGTERM and SIGINT, which are usually sent to the whole process group.

    The parent needs its workers to shut down in order; they end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow_parent()
