"""Several processes that work as one: how they meet, stop together, and end if one is gone."""

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

from condiff_jax.runtime.process import STOPPED, Stopped, fail, limit_workers, postponed

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as gone
FAREWELL = 30  # seconds that one waits for the others to leave with it


def cluster(environment: Mapping[str, str]) -> str | None:
    """What has started this process as one of several, None where nothing says so.

    Of what `jax.distributed.initialize` knows. A batch script of Slurm is none: its srun is.
    """
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    slices = "MEGASCALE_COORDINATOR_ADDRESS" in environment
    if slices or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "Cloud TPU on Kubernetes"
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    other = environment.get("JAX_PLATFORMS", "tpu") != "tpu" or "TPU_SKIP_MDS_QUERY" in environment
    if devices and util.find_spec("libtpu") and not other:
        return "Cloud TPU"
    return None


def initialize(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Meet the other processes, before anything else of JAX; one that was started alone stays so.

    coordinator: HOST:PORT of process 0; processes: how many; process: which of them this is. All
    three or none; without them the cluster tells. Ends with one line: code 2 for bad flags, 1 where
    the others are not found.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [flag for flag, value in given.items() if value is None]
    found = cluster(os.environ)
    if len(missing) == 3 and not found:
        return
    if 0 < len(missing) < 3:
        sys.exit(fail(f"{missing[0]} is missing; give {', '.join(given)} or none of them"))
    where = f"process {process} of {processes}, {coordinator}" if coordinator else found
    try:
        # Given explicitly, nothing is to be detected, and every process uses all its devices.
        detect = "deactivate" if coordinator else None
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=detect,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=FAREWELL,
        )
    except Exception as error:  # of many kinds, from several libraries
        fail(f"the processes did not meet ({where}): {error}")
        sys.exit(1)  # not bad input: another attempt may find them
    # JAX ends a process in one line where another one is gone; absl would let stacks follow.
    faulthandler.disable()


def is_multiprocess() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def barrier(name: str) -> None:
    """Wait until all processes are here: what one has written before, all find after."""
    if is_multiprocess():
        multihost_utils.sync_global_devices(name)


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """With several processes, let an error, an exit or SIGTERM end this one at once.

    Python's own way out waits for the others, which wait for this one in the midst of a step. With
    it gone they notice, soon or after HEARTBEAT, and end, too. After SIGTERM, which mostly reaches
    all of them, they leave together: without process 0 the others would be aborted.
    """
    try:
        yield
        barrier("end")
    except BaseException as error:
        if not is_multiprocess():
            raise
        code = 1
        if isinstance(error, Stopped):
            print(STOPPED, flush=True)
            code = 0
            with contextlib.suppress(RuntimeError):  # not all were told; they notice
                jax.distributed.shutdown()
        elif isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else bool(error.code)
        else:
            traceback.print_exception(error)
            me = f"process {jax.process_index()} of {jax.process_count()}"
            fail(
                f"{me}: {type(error).__name__}; where it is about a connection or a timeout, "
                "another process is gone, and its output says why. The same command goes on from "
                "the last checkpoint"
            )
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Interrupt:
    """Remembers SIGTERM (the notice of a preemption) so that the loop can end in order.

    With several processes JAX's coordination service catches it, whichever of them it reaches.
    """

    def __enter__(self):
        self.asked = self.raises = False
        if not is_multiprocess():
            self.previous = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, _, frame):
        self.asked = True
        if self.raises and postponed(self._ask, frame):
            return
        limit_workers()
        if self.raises:
            self.raises = False  # once: the next one must not interrupt the end in order
            raise Stopped

    @contextlib.contextmanager
    def immediate(self) -> Iterator[None]:
        """Raise Stopped in here as soon as SIGTERM arrives, or if it has: nothing is half-done.

        An error after SIGTERM is none: what waits for a worker process finds that gone.
        """
        self.raises = not is_multiprocess()
        try:
            if self.asked:
                raise Stopped
            yield
        except Exception:
            if self.asked:
                raise Stopped from None
            raise
        finally:
            self.raises = False

    def after(self, step: int) -> bool:
        """Whether to stop after this step, the same for all processes; to be called each step."""
        if is_multiprocess():
            self.asked = multihost_utils.reached_preemption_sync_point(step)
        return self.asked

    def __exit__(self, *_):
        if not is_multiprocess():
            signal.signal(signal.SIGTERM, self.previous)
