"""How worker processes begin."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """End this worker process as soon as the one that started it ends, however that happens."""
    parent = multiprocessing.parent_process()

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def leave_signals_to_parent(*_) -> None:
    """Let SIGTERM and SIGINT, which mostly reach the whole process group, not end this worker.

    Without its workers the parent could not end in order. They end with it.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    follow_parent()
