"""Meters of the training loop: times, memory, stalls, traces and broken images."""

import json
import time

import jax
import numpy as np
import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.runtime import flops
from condiff_jax.training import loop, meters
from tests import tiny

GOOD = {"loss": np.float32(1), "grad_norm": np.float32(1), "broken": np.int32(0)}


def test_too_many_broken_images_stop_the_run():
    meter = meters.Meter(0)
    meter.add(1, {**GOOD, "broken": np.int32(10)}, 64)
    assert meter.read()["broken_images"] == 10  # 1% of the first thousand
    meter.add(2, {**GOOD, "broken": np.int32(1)}, 64)
    with pytest.raises(ConfigError, match="11 broken images among 128"):
        meter.read()
    long = meters.Meter(100_000)  # 1% of these may be broken
    long.add(1, {**GOOD, "broken": np.int32(1000)}, 64)
    assert long.read()["broken_images"] == 1000


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_is_named(name, value):
    meter = meters.Meter(0)
    meter.add(7, GOOD, 8)
    meter.add(8, {**GOOD, name: np.float32(value)}, 8)
    with pytest.raises(FloatingPointError, match="^step 8: "):
        meter.read()


def test_metrics_are_means_since_the_last_read():
    meter = meters.Meter(0)
    for values in ((1, 5), (3,)):
        for value in values:
            meter.add(1, {**GOOD, "loss": np.float32(value)}, 8)
        assert meter.read()["loss"] == 3


def test_the_host_stays_two_steps_ahead_of_the_device(monkeypatch):
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda metrics: waited.append(metrics["step"]))
    meter = meters.Meter(0)
    for step in range(5):
        meter.add(step, {**GOOD, "step": step}, 8)
    assert waited == [0, 1, 2]


def test_input_wait_is_the_share_of_the_time_since_the_last_read(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def data():
        while True:
            now[0] += 3
            yield "batch"

    meter, batches = meters.Meter(0), data()
    for _ in range(2):
        assert meter.wait(batches) == "batch"
        now[0] += 1  # the step
        meter.add(1, GOOD, 8)
    values = meter.read()
    assert values["step_time"] == 4 and values["input_wait"] == 0.75
    meter.add(3, GOOD, 8)
    now[0] += 2
    assert meter.read()["input_wait"] == 0


class Device:
    def __init__(self, peak):
        self.peak, self.device_kind = peak, "abacus"

    def memory_stats(self):
        return self.peak and {"peak_bytes_in_use": self.peak}


@pytest.mark.parametrize("peaks, expected", [((2**30, 3 * 2**30), 3), ((None, None), None)])
def test_memory_is_that_of_the_fullest_device(peaks, expected, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(peak) for peak in peaks])
    assert meters.throughput(tiny.config(), 0.5, 10**9).get("memory_gib") == expected


def test_throughput_by_hand(monkeypatch):
    monkeypatch.setattr(meters, "_peak", lambda: 0.25)
    values = meters.throughput(tiny.config(batch_size=16), 0.5, 10**10)
    assert values["images_per_sec"] == 32  # on eight devices; three forwards an image
    assert values["tflops_per_device"] == pytest.approx(3 * 32 * 0.01 / 8)
    assert values["mfu"] == pytest.approx(0.12 / 0.25)


def test_an_accelerator_without_a_known_peak_is_named_once(monkeypatch, caplog):
    meters._peak.cache_clear()
    monkeypatch.setattr(flops, "peak_tflops", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device(0)])
    for _ in range(2):
        assert "mfu" not in meters.throughput(tiny.config(), 0.5, 1)
    assert [record.getMessage() for record in caplog.records] == [
        "no mfu: flops.CHIPS has no peak of abacus"
    ]
    meters._peak.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert meters._peak() is None and len(caplog.records) == 1  # no warning on CPU
    meters._peak.cache_clear()


def test_a_stall_shows_where_all_threads_are(capfd):
    watchdog = meters.Watchdog(0.2)
    for _ in range(4):
        watchdog.step()
        time.sleep(0.1)
    assert not capfd.readouterr().err  # no step took too long
    time.sleep(0.3)
    watchdog.close()
    printed = capfd.readouterr().err
    assert "Timeout" in printed and "test_a_stall_shows_where_all_threads_are" in printed
    time.sleep(0.3)
    meters.Watchdog(0).step()
    assert not capfd.readouterr().err


@pytest.fixture
def traces(monkeypatch):
    """List of the calls to the profiler: ("begin", path) or "end"."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("begin", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("end"))
    return calls


@pytest.mark.parametrize("first, begun", [(1, 3), (4, 4), (6, None)])
def test_a_trace_covers_its_steps_in_this_run(traces, first, begun):
    trace = meters.Trace(tiny.config(profile=(3, 5)), "run")
    traced = []
    for step in range(first, 9):
        trace.before(step)
        traced += [step] if trace.on else []
        trace.after(step, None)
    assert traced == (list(range(begun, 6)) if begun else [])
    assert traces == ([("begin", "run"), "end"] if begun else [])


@pytest.mark.slow
def test_training_stops_its_trace_at_the_end(tmp_path, traces):
    with tiny.few_layers():
        config = tiny.config(steps=3, profile=(2, 9), **{"sampling.n": 2})
        loop.run(config, str(tmp_path))
    assert traces == [("begin", str(tmp_path)), "end"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert all(0 <= line["input_wait"] <= 1 for line in lines)


def test_a_trace_is_written(tmp_path):
    config = tiny.config(profile=(1, 1))
    trace = meters.Trace(config, tmp_path)
    trace.before(1)
    trace.after(1, jax.numpy.ones(3) + 1)
    assert not trace.on and list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))
