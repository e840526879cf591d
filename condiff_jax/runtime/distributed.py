"""Multi-process JAX: initialization, barriers, coordinated stops, and exit on errors."""

from __future__ import annotations

import contextlib
import faulthandler
import glob
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib import util

import jax
from jax.experimental import multihost_utils

from condiff_jax.runtime.process import (
    STOPPED_MESSAGE,
    Stopped,
    defer_past_gc,
    fail,
    kill_workers_later,
)

HEARTBEAT_TIMEOUT = 30  # seconds without a heartbeat after which a process counts as lost
SHUTDOWN_TIMEOUT = 30  # seconds that a process waits for the others to shut down with it


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Name the launcher that started this process as one of several; None for a single process.

    Covers launchers that `jax.distributed.initialize` detects. JAX's detection is not used, because
    it is private, asks the metadata server on TPUs, and treats a single Slurm task as a cluster,
    restricted to one device. A Slurm batch script is no task; those of its srun are.
    """
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    slices = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    if slices or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU on Kubernetes"
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    other_platform = environment.get("JAX_PLATFORMS", "tpu") != "tpu"
    ignore_tpus = other_platform or "TPU_SKIP_MDS_QUERY" in environment
    if devices and util.find_spec("libtpu") and not ignore_tpus:
        return "Cloud TPU"
    return None


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connect to the other processes, before any other use of JAX; no-op for a single process.

    coordinator: HOST:PORT of process 0; processes: their number; process: the index of this one.
    Give all three or none: without them the cluster is detected. Exits with one line: code 2 for
    bad flags, 1 where the connection fails.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in flags.items() if value is None]
    cluster = detect_cluster(os.environ)
    if len(missing) == 3 and not cluster:
        return
    if 0 < len(missing) < 3:
        sys.exit(fail(f"{missing[0]} is missing; give {', '.join(flags)} or none of them"))
    where = f"process {process} of {processes}, {coordinator}" if coordinator else cluster
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            # With explicit flags nothing is detected, and every process uses all its devices.
            cluster_detection_method="deactivate" if coordinator else None,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except Exception as error:  # of many types, from several libraries
        fail(f"the processes did not connect ({where}): {error}")
        sys.exit(1)  # not bad input: another attempt may succeed
    # JAX ends a process with one line when another one is lost; absl would add stack traces.
    faulthandler.disable()


def is_multiprocess() -> bool:
    """Return whether this process is one of several."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Wait for all processes, so that all can read what one has written before."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """With several processes, end this one at once on an error, an exit or SIGTERM.

    Python's regular exit waits for the other processes, which wait for this one within a step.
    Once it is gone, they notice immediately or after HEARTBEAT_TIMEOUT, and end too. SIGTERM
    usually reaches all processes, which then shut down together: without process 0 the others would
    be aborted.
    """
    try:
        yield
        barrier("end")
    except BaseException as error:
        if not is_multiprocess():
            raise
        code = 1
        if isinstance(error, Stopped):
            print(STOPPED_MESSAGE, flush=True)
            code = 0
            with contextlib.suppress(RuntimeError):  # processes without SIGTERM end by themselves
                jax.distributed.shutdown()
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else bool(error.code)
        else:
            traceback.print_exception(error)
            fail(
                f"process {jax.process_index()} of {jax.process_count()}: {type(error).__name__}; "
                "if it is about a connection or a timeout, another process is gone, and its output "
                "says why. The same command resumes from the last checkpoint"
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Interrupt:
    """Context manager that records SIGTERM (the notice of a preemption) for a clean stop.

    With several processes JAX's coordination service catches it, whichever process it reaches.
    """

    def __enter__(self):
        self.requested = False
        self.raises = False
        if not is_multiprocess():
            self.previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def _handle(self, _, frame):
        self.requested = True
        if self.raises and defer_past_gc(self._handle, frame):
            return
        kill_workers_later()
        if self.raises:
            self.raises = False  # once: a second SIGTERM must not interrupt the clean stop
            raise Stopped

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise Stopped within the block as soon as SIGTERM arrives, or at its start if it has.

        For blocks that leave nothing half-done. An error after SIGTERM becomes Stopped: it comes
        from waiting for a worker process that SIGTERM has ended.
        """
        self.raises = not is_multiprocess()
        try:
            if self.requested:
                raise Stopped
            yield
        except Exception:
            if self.requested:
                raise Stopped from None
            raise
        finally:
            self.raises = False

    def after(self, step: int) -> bool:
        """Return whether to stop after this step, alike on all processes; call it at each step."""
        if is_multiprocess():
            self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def __exit__(self, *_):
        if not is_multiprocess():
            signal.signal(signal.SIGTERM, self.previous)
