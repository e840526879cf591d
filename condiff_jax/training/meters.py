"""Metrics, throughput, stall detection and profiler traces of the training loop."""

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

BROKEN_LIMIT = 0.01  # fraction of broken images above which a run stops


class Meter:
    """Collector of the metrics of each step on the device; the host reads them at intervals."""

    def __init__(self, images_before: int):
        self.pending: list[tuple[int, dict]] = []
        self.seen = images_before
        self.broken = 0
        self.loss = math.nan  # mean at the last read
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last read, which was not spent on steps."""
        self.start = time.perf_counter()
        self.timed = 0
        self.waited = 0.0

    def wait(self, data: Iterator) -> Any:
        """Return the next batch; the time until it is ready counts as input wait."""
        start = time.perf_counter()
        batch = next(data)
        self.waited += time.perf_counter() - start
        return batch

    def add(self, step: int, metrics: dict, images: int) -> None:
        """Add the metrics of a dispatched step, without waiting for them."""
        self.pending.append((step, metrics))
        self.seen += images
        self.timed += 1
        if len(self.pending) > 2:  # keep the host at most two steps ahead of the device
            jax.block_until_ready(self.pending[-3][1])

    def read(self) -> dict[str, float]:
        """Return means since the last read.

        Raises FloatingPointError for a loss that is not finite, ConfigError for too many broken
        images.
        """
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
                    "command to resume from the last good checkpoint"
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
    """Return images_per_sec, tflops_per_device, and mfu if the peak of the device is known.

    A training step counts as 3 forwards an image. memory_gib is the peak usage of any device of
    this host, if the backend reports it.
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
    """`flops.peak_tflops`; warns once about accelerators that are missing there."""
    peak = flops.peak_tflops()
    if peak is None and jax.default_backend() != "cpu":
        kind = jax.devices()[0].device_kind
        logging.warning("no mfu: flops.CHIPS has no peak of %s", kind)
    return peak


class Watchdog:
    """Stall detector: writes the stacks of all threads to stderr if no step begins for `seconds`.

    0 seconds disable it. It is a thread in C, so that it works even while Python is blocked.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds

    def step(self) -> None:
        """Restart the countdown at the start of a step."""
        if self.seconds:
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=2)

    def close(self) -> None:
        """Pause the countdown until the next step."""
        faulthandler.cancel_dump_traceback_later()


class Trace:
    """Profiler trace of the steps in config.profile, for xprof and TensorBoard.

    It is written to DIR/plugins/profile/.
    """

    def __init__(self, config: Config, path: epath.Path):
        self.first, self.last = config.profile or (0, 0)
        self.path = path
        self.on = False

    def before(self, step: int) -> None:
        """Start the trace before the first traced step of this run."""
        if not self.on and self.first <= step <= self.last:
            jax.profiler.start_trace(str(self.path))
            self.on = True

    def after(self, step: int, metrics: Any) -> None:
        """Stop the trace when the devices have finished the last traced step."""
        if self.on and step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Stop the trace if it is on."""
        if self.on:
            jax.profiler.stop_trace()
            self.on = False
