"""What the training loop watches: metrics and their times, memory, stalls, and a trace if asked."""

from __future__ import annotations

import faulthandler
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.runtime import flops

BROKEN_LIMIT = 0.01  # share of broken images that stops a run


class Meter:
    """Collects the metrics of each step on the device; the host reads them at intervals only."""

    def __init__(self, images_before: int):
        self.pending: list[tuple[int, dict]] = []
        self.seen, self.broken = images_before, 0
        self.loss = math.nan  # mean of the last read
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last read: it went to something else than steps."""
        self.start, self.timed, self.waited = time.perf_counter(), 0, 0.0

    def wait(self, data: Iterator) -> Any:
        """The next batch; the time that takes counts as input wait."""
        start = time.perf_counter()
        batch = next(data)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, metrics: dict, images: int) -> None:
        """Note the device values of one step that was started."""
        self.pending.append((step, metrics))
        self.seen += images
        self.timed += 1
        if len(self.pending) > 2:  # stay two steps ahead of the device, not hundreds
            jax.block_until_ready(self.pending[-3][1])

    def read(self) -> dict[str, float]:
        """Means since the last read; errors name the step of a bad loss, or too many bad images."""
        steps = [step for step, _ in self.pending]
        values = jax.device_get([metrics for _, metrics in self.pending])
        seconds = time.perf_counter() - self.start
        step_time, input_wait = seconds / max(self.timed, 1), self.waited / seconds
        self.restart_clock()
        self.pending = []
        for step, value in zip(steps, values, strict=True):
            if not math.isfinite(value["loss"]) or not math.isfinite(value["grad_norm"]):
                raise FloatingPointError(
                    f"step {step}: loss {value['loss']}, gradient norm {value['grad_norm']}; "
                    "lower optimizer.learning_rate or set optimizer.clip_norm, then run the same "
                    "command to go on from the last good checkpoint"
                )
        self.broken += int(sum(value["broken"] for value in values))
        if self.broken > BROKEN_LIMIT * max(self.seen, 1000):
            raise ConfigError(
                "data.path",
                f"{self.broken} broken images among {self.seen} read, more than "
                f"{BROKEN_LIMIT:.0%}; see the log for their names and repair the data set",
            )
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        self.loss = means["loss"]
        return means | {
            "step_time": step_time,
            "input_wait": input_wait,
            "broken_images": self.broken,
        }


def throughput(config: Config, step_time: float, flop_image: int) -> dict[str, float]:
    """images_per_sec, tflops_per_device (3 forwards an image); mfu where the peak is known.

    memory_gib: the most that a device of this host has used so far, where it tells.
    """
    rate = config.batch_size / step_time
    tflops = 3 * flop_image * rate / jax.device_count() / 1e12
    out = {"images_per_sec": rate, "tflops_per_device": tflops}
    if peak := _peak():
        out["mfu"] = tflops / peak
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    if used := max(stat.get("peak_bytes_in_use", 0) for stat in stats):
        out["memory_gib"] = used / 2**30
    return out


@functools.cache
def _peak() -> float | None:
    """`flops.peak_tflops`; a warning, once, for accelerators that it does not know."""
    peak = flops.peak_tflops()
    if peak is None and jax.default_backend() != "cpu":
        kind = jax.devices()[0].device_kind
        logging.warning("no mfu: flops.CHIPS does not know the peak of %s", kind)
    return peak


class Watchdog:
    """Writes the stacks of all threads to stderr when no step begins for so many seconds; 0: never.

    A thread of C does it, so that it works whatever holds Python up.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def step(self) -> None:
        """A step begins."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=2)

    def close(self) -> None:
        """What comes now may take its time."""
        faulthandler.cancel_dump_traceback_later()


class Trace:
    """A trace of the steps config.profile for xprof and TensorBoard, in DIR/plugins/profile/."""

    def __init__(self, config: Config, path: epath.Path):
        self.first, self.last = config.profile or (0, 0)
        self.path, self.on = path, False

    def before(self, step: int) -> None:
        """Begin with the first of the steps, or with the first of this run among them."""
        if not self.on and self.first <= step <= self.last:
            jax.profiler.start_trace(str(self.path))
            self.on = True

    def after(self, step: int, metrics: Any) -> None:
        """End when the devices have done the last of them."""
        if self.on and step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End now, if it is on."""
        if self.on:
            jax.profiler.stop_trace()
            self.on = False
