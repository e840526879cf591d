"""The CPU seconds of each test file, all processes that it starts included; see docs/testing.md.

Wall time on shared machines says little. What JAX spends on tracing, lowering and compiling in the
test process itself is told apart.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import defaultdict
from pathlib import Path

import jax
import pytest

SHOWN = 10
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}
TICKS = os.sysconf("SC_CLK_TCK")


def tree_seconds() -> float:
    """CPU seconds of this process and of all that it has started, also of those that have ended."""
    parents, seconds = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            fields = stat.read_text().rsplit(")", 1)[1].split()
            pid = int(stat.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = sum(map(int, fields[11:15])) / TICKS  # with children waited for
    own, found = {os.getpid()}, set()
    while own:
        found |= own
        own = {pid for pid, parent in parents.items() if parent in own} - found
    return sum(seconds[pid] for pid in found if pid in seconds)


class CpuReport:
    """Counts by file, in xdist's workers too, and prints the most expensive ones at the end."""

    def __init__(self):
        self.files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.current: dict[str, float] | None = None
        jax.monitoring.register_event_duration_secs_listener(self.listen)

    def listen(self, event: str, duration: float, **_) -> None:
        """Add what JAX reports to the file whose test runs."""
        if self.current is not None and event in STAGES:
            self.current[STAGES[event]] += duration

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        """Charge a test, with the fixtures that it sets up and tears down, to its file."""
        self.current = self.files[item.location[0]]
        before = tree_seconds()
        try:
            return (yield)
        finally:
            self.current["CPU"] += tree_seconds() - before
            self.current = None

    def pytest_sessionfinish(self, session):
        """Hand a worker's counts to the process that prints."""
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cpu"] = {k: dict(v) for k, v in self.files.items()}

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        """Add the counts of a worker that has ended."""
        for file, counts in getattr(node, "workeroutput", {}).get("cpu", {}).items():
            for name, seconds in counts.items():
                self.files[file][name] += seconds

    def pytest_terminal_summary(self, terminalreporter):
        """Print the table; with TEST_CPU_JSON=FILE write all of it there."""
        if not self.files:
            return
        if path := os.environ.get("TEST_CPU_JSON"):
            Path(path).write_text(json.dumps(self.files, indent=1, sort_keys=True))
        rows = sorted(self.files.items(), key=lambda row: -row[1]["CPU"])
        total = sum(counts["CPU"] for _, counts in rows)
        terminalreporter.section(f"CPU seconds of the {SHOWN} most expensive files")
        names = ("CPU", *STAGES.values())
        terminalreporter.write_line("".join(f"{name:>10}" for name in names) + "  file")
        for file, counts in rows[:SHOWN]:
            cells = "".join(f"{counts[name]:10.1f}" for name in names)
            terminalreporter.write_line(f"{cells}  {file}")
        terminalreporter.write_line(f"{total:10.1f} of all {len(rows)} files")
