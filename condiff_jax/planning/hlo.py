"""Reading the text of a compiled program: what runs how often, for how long, and what it sends."""

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
    """The instructions of every computation by its name; callers after callees, the entry last."""
    out, entry, current = {}, None, None
    for line in text.splitlines():
        if current is None and (header := HEADER.match(line)):
            current = out.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    if entry is None:
        raise ValueError("this text has no ENTRY computation, so it is no HLO module")
    out[entry] = out.pop(entry)
    return out


def trip_count(line: str, parts: dict[str, list[str]]) -> int:
    """How often the body of the `while` in this line runs; 1 where its text does not tell.

    XLA notes it for some backends. Otherwise a loop of JAX's counts up from 0 to the one constant
    of its condition.
    """
    if noted := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line):
        return int(noted[1])
    condition = "\n".join(parts[re.search(r"condition=%([\w.-]+)", line)[1]])
    limits = set(re.findall(r" = [su]\d+\[\]\S* constant\((\d+)\)", condition))
    return int(limits.pop()) if len(limits) == 1 and "direction=LT" in condition else 1


class Run(NamedTuple):
    """An instruction, its computation, and how often one run of the program executes it."""

    line: str
    within: str
    times: int


def executions(text: str) -> list[Run]:
    """All instructions but those that are never reached.

    Nested loops multiply; every branch of a conditional counts as taken.
    """
    parts = computations(text)
    times, out = Counter({next(reversed(parts)): 1}), []
    for name in reversed(parts):
        if not times[name]:
            continue
        for line in parts[name]:
            out.append(Run(line, name, times[name]))
            loops = trip_count(line, parts) if " while(" in line else 1
            for key, one, several in CALLEES.findall(line):
                for callee in [one] if one else re.findall(r"%([\w.-]+)", several):
                    if key in CALLS and callee in parts:
                        times[callee] += times[name] * loops
    return out


def cycles(runs: list[Run]) -> int:
    """The compiler's estimates summed over all that a TPU core executes.

    Collectives and kernels of our own (Pallas) have none.
    """
    found = ((re.search(r'"estimated_cycles":"(\d+)"', run.line), run.times) for run in runs)
    return sum(int(estimate[1]) * times for estimate, times in found if estimate)


def sizes(shape: str) -> list[float]:
    """Bytes of the arrays in a shape such as "(bf16[8,128]{1,0}, u32[])"."""
    bits = [(8 if kind == "pred" else int(b), dims) for kind, b, dims in ARRAY.findall(shape)]
    return [b / 8 * math.prod(int(d) for d in dims.split(",") if d) for b, dims in bits]


def group_size(line: str) -> int:
    """Devices that take part in one collective; 1 where the line does not say."""
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
    """Bytes that each device sends in one run by kind of collective, with rings.

    Of an array of S bytes on n devices: (n - 1) / n S to gather or scatter it, twice that to reduce
    it everywhere, S to permute.
    """
    sent, kinds = {}, {}
    for number, (line, within, times) in enumerate(runs):
        if not (found := COLLECTIVE.search(line)):
            continue
        shape, kind, start = found.groups()
        n, arrays = group_size(line), sizes(shape)
        if start and kind != "all-reduce":  # (operands, results[, contexts])
            arrays = [size for size in arrays if size > 4] or arrays
            arrays = arrays[len(arrays) // 2 :]
        share = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
        if kind == "all-reduce" and within.startswith("all-reduce-scatter"):  # as TPUs write it
            kind, share["reduce-scatter"] = "reduce-scatter", (n - 1) / n
        # What runs in the background is in the text of all that runs meanwhile, with its channel.
        channel = re.search(r"channel_id=(\d+)", line)
        channel = int(channel[1]) if channel else -number
        amount = share.get(kind, (n - 1) / n) * sum(arrays) * times
        sent[channel], kinds[channel] = max(amount, sent.get(channel, 0)), kind
    out = Counter()
    for channel, kind in kinds.items():
        out[kind] += sent[channel]
    return {kind: round(amount) for kind, amount in out.items()}


def custom_calls(runs: list[Run]) -> dict[str, int]:
    """How often one run calls each kernel that is not XLA's own, by target."""
    out = Counter()
    for run in runs:
        if found := re.search(r'custom_call_target="([^"]*)"', run.line):
            out[found[1]] += run.times
    return dict(out)
