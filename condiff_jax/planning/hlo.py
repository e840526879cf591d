"""Parsing of compiled HLO text: executed instructions, cycle estimates, collectives, kernels."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import NamedTuple

HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
CALLEES = re.compile(r"(\w+)=(?:%([\w.-]+)|\{((?:%[\w.-]+(?:, )?)+)\})")
CALLS = {
    "body", "condition", "calls", "to_apply", "branch_computations", "true_computation",
    "false_computation", "called_computations",
}  # fmt: skip
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


def computations(text: str) -> dict[str, list[str]]:
    """Parse the instructions of each computation, by name; callees first, the entry last."""
    parts = {}
    entry = current = None
    for line in text.splitlines():
        if current is None and (header := HEADER.match(line)):
            current = parts.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("this text has no ENTRY computation, so it is no HLO module")
    parts[entry] = parts.pop(entry)
    return parts


def trip_count(line: str, parts: dict[str, list[str]]) -> int:
    """Return the trip count of the `while` in this line; 1 where it is unknown.

    XLA annotates it on some backends. Otherwise a loop of JAX counts from 0 up to the only constant
    of its condition.
    """
    if annotated := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(annotated[1])
    condition = "\n".join(parts[re.search(r"condition=%([\w.-]+)", line)[1]])
    limits = set(re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", condition))
    return int(limits.pop()) if len(limits) == 1 and "direction=LT" in condition else 1


class Run(NamedTuple):
    """Instruction, its computation, and how often one run of the program executes it."""

    line: str
    within: str
    times: int


def executions(text: str) -> list[Run]:
    """List all reachable instructions with their execution counts.

    Counts of nested loops multiply; every branch of a conditional counts as taken.
    """
    parts = computations(text)
    times = Counter({next(reversed(parts)): 1})
    runs = []
    for name in reversed(parts):
        if not times[name]:
            continue
        for line in parts[name]:
            runs.append(Run(line, name, times[name]))
            loops = trip_count(line, parts) if " while(" in line else 1
            for key, single, multiple in CALLEES.findall(line):
                for callee in [single] if single else re.findall(r"%([\w.-]+)", multiple):
                    if key in CALLS and callee in parts:
                        times[callee] += times[name] * loops
    return runs


def cycles(runs: list[Run]) -> int:
    """Sum the compiler's cycle estimates over all executed instructions of a TPU core.

    Collectives and custom kernels (Pallas) have no estimates.
    """
    total = 0
    for run in runs:
        if estimate := re.search(r'"estimated_cycles":"(\d+)"', run.line):
            total += int(estimate[1]) * run.times
    return total


def sizes(shape: str) -> list[float]:
    """Return the bytes of each array in a shape such as "(bf16[8,128]{1,0}, u32[])"."""
    out = []
    for kind, bits, dims in ARRAY.findall(shape):
        item_size = (8 if kind == "pred" else int(bits)) / 8
        out.append(item_size * math.prod(int(dim) for dim in dims.split(",") if dim))
    return out


def group_size(line: str) -> int:
    """Return the number of devices in one group of a collective; 1 where the line has none."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else axes[name] for name, part in named)
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    return 1


def collectives(runs: list[Run]) -> dict[str, int]:
    """Compute the bytes that each device sends in one run, by kind of collective, with rings.

    Of an array of S bytes on n devices: (n - 1) / n S for all-gather and reduce-scatter, twice that
    for all-reduce, S for collective-permute.
    """
    sent, kinds = {}, {}
    for number, (line, within, times) in enumerate(runs):
        if not (match := COLLECTIVE.search(line)):
            continue
        shape, kind, start = match.groups()
        n, arrays = group_size(line), sizes(shape)
        if start and kind != "all-reduce":  # (operands, results[, contexts])
            arrays = [size for size in arrays if size > 4] or arrays
            arrays = arrays[len(arrays) // 2 :]
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        if kind == "all-reduce" and within.startswith("all-reduce-scatter"):  # form on TPUs
            kind = "reduce-scatter"
            share[kind] = (n - 1) / n
        # An asynchronous collective recurs in each instruction that it overlaps with, always with
        # the same channel.
        channel_id = re.search(r"channel_id=(\d+)", line)
        channel = int(channel_id[1]) if channel_id else -number
        amount = share.get(kind, (n - 1) / n) * sum(arrays) * times
        sent[channel] = max(amount, sent.get(channel, 0))
        kinds[channel] = kind
    totals = Counter()
    for channel, kind in kinds.items():
        totals[kind] += sent[channel]
    return {kind: round(amount) for kind, amount in totals.items()}


def custom_calls(runs: list[Run]) -> dict[str, int]:
    """Count the custom calls (kernels that are not XLA's) of one run, by target."""
    counts = Counter()
    for run in runs:
        if target := re.search(r'custom_call_target="([^"]*)"', run.line):
            counts[target[1]] += run.times
    return dict(counts)
