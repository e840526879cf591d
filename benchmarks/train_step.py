"""How fast a train step is: `python -m benchmarks.train_step [--cores=0] [--save]`.

Latent diffusion for 1000 classes on one device: our `compile_step` against what one would
write in PyTorch around diffusers' DiT or UNet, eager and compiled. Same weights, shapes, type and
objective (a sample of the latents' moments, t, noise, dropped labels, squared error), Adam, moving
average of the parameters and norm of the gradient; the batch is on the device. Before anything is
timed, the loss and the norm of the gradient of one step with the same noise must agree.
Then they take turns; compiling is not counted. FLOPs are three times those of the forward pass;
what --remat computes again is not counted.

On CPUs, CPU time is what counts: other processes take little of it. On a GPU:
`--size=XL/2 --dtype=bfloat16 --attention=auto --batch=128 --largest --save` looks for the largest
batch of each method, from 128 on, and times each at its own and all at the least of them. Each
has the GPU for itself, in processes one after the other, or they could not have the same memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import optax
import torch

from benchmarks import timing
from benchmarks.timing import COMPILED, OURS, THEIRS
from benchmarks.train_methods import (
    METHODS,
    NAMES,
    create_batch,
    create_methods,
    create_params,
    create_system,
)
from condiff_jax.config.errors import ConfigError
from condiff_jax.models.attention import BACKENDS
from condiff_jax.models.transformer import REMAT
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.runtime import flops
from condiff_jax.runtime.process import fail

RESULTS = Path(__file__).parent / "results" / "train_step.json"
# Largest relative differences of the loss and of the norm of the gradient.
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 2e-2)}
UNIT = 8  # largest batches are multiples of it
NO_MEMORY = 3  # exit code
SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "ALLOC_FAILED")  # of XLA, CUDA, cuBLAS and cuDNN


class BenchmarkError(Exception):
    """What ends the command with a line and an exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def agreement(made: dict[str, dict[str, float]], expected: str) -> dict[str, dict[str, float]]:
    """What each method made, with its relative differences from the one that is expected."""
    first = made.get(expected, {})
    return {
        name: found | {f"{key}_error": abs(found[key] / first[key] - 1) for key in first}
        for name, found in made.items()
    }


def agree(record: dict, dtype: str) -> bool:
    """Whether all differences are within LIMITS; a NaN is not."""
    return all(
        values.get(f"{key}_error", 0.0) <= limit
        for values in (*record["agreement"].values(), *record["attention"].values())
        for key, limit in zip(("loss", "grad_norm"), LIMITS[dtype], strict=True)
    )


def with_backend(objective: DiffusionObjective, backend: str) -> DiffusionObjective:
    """The same objective with attention by another backend."""
    return dataclasses.replace(objective, model=objective.model.clone(backend=backend))


def compare_attention(objective: DiffusionObjective, size: int) -> dict[str, dict[str, float]]:
    """Our first loss and norm of the gradient by the backend of attention: plain XLA, and ours."""
    batch, noise = create_batch(objective, size), objective.draw_noise(jax.random.key(0), size)
    params, made = jax.device_put(create_params(objective), jax.devices()[0]), {}
    for backend in ("xla", objective.model.backend):
        loss_fn = with_backend(objective, backend).loss
        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, noise)
        made[backend] = {"loss": float(loss), "grad_norm": float(optax.global_norm(grads))}
    return agreement(made, "xla")


def summarise(record: dict, cases: dict) -> list[dict]:
    """A row for each of cases {method: (batch, seconds of steps (repetitions, 2), peak bytes)}.

    On CPUs it is CPU time that is compared. speed: relative to each of diffusers', by picture; what
    is relative is taken in each repetition first, the load of a machine changes more slowly.
    """
    clock = int(record["device"] == "cpu")
    used = {name: seconds[:, clock] / batch for name, (batch, seconds, _) in cases.items()}
    rows = []
    for name, (batch, seconds, memory) in cases.items():
        wall, cpu = np.median(seconds, axis=0)
        tflops = 3 * record["gflop_forward"] * batch / wall / 1e3
        row = {
            "method": name, "batch": batch, "images_per_second": batch / wall,
            "images_per_cpu_second": batch / cpu, "seconds": wall, "cpu_seconds": cpu,
            "least": seconds[:, clock].min(), "most": seconds[:, clock].max(), "tflops": tflops,
            "speed": {
                other: np.median(used[other] / used[name])
                for other in (THEIRS, COMPILED) if other in used
            },
        }  # fmt: skip
        if record["peak_tflops"] and record["settings"]["dtype"] == "bfloat16":  # whose it is
            row["mfu"] = tflops / record["peak_tflops"]
        if memory:
            row["memory_gib"] = memory / 2**30
        rows.append(row)
    return rows


def run(asked: argparse.Namespace) -> dict:
    """The record of methods that take turns in this process; not timed if they do not agree."""
    alone = asked.only in ("eager", "compile")  # a GPU is PyTorch's then
    if alone:
        jax.config.update("jax_platforms", "cpu")
    gpu = timing.start(asked.cores) or (alone and torch.cuda.is_available())
    with timing.precision(asked.dtype):
        objective = create_system(asked)
        gflop = objective.forward_flops() / 1e9
        record = timing.surroundings() | {"settings": vars(asked), "gflop_forward": gflop}
        record |= {"peak_tflops": flops.peak_tflops(), "attention": {}, "rows": []}
        if not asked.only and objective.model.backend != "xla":
            record["attention"] = compare_attention(objective, min(asked.batch, UNIT))
        methods = create_methods(asked, objective, "cuda" if gpu else "cpu")
        made, record["left_out"] = timing.warm_up({n: m.first for n, m in methods.items()})
        record["agreement"] = agreement(made, OURS)
        if not asked.repetitions or not agree(record, asked.dtype):
            return record
        record["memory"] = {name: methods[name].peak() for name in made}
        seconds = timing.measure({name: methods[name].run for name in made}, asked.repetitions)
    seconds = {name: values / asked.steps for name, values in seconds.items()}
    cases = {name: (asked.batch, seconds[name], record["memory"][name]) for name in made}
    record["seconds"] = {name: values.tolist() for name, values in seconds.items()}
    return record | {"rows": summarise(record, cases)}


def child(asked: argparse.Namespace, **changes) -> dict | None:
    """The record of this command with other flags, by another process; None: memory ran out."""
    settings, memory = vars(asked) | {"largest": False} | changes, {}
    if settings["only"] == "ours":  # PyTorch needs none
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    elif settings["only"]:
        settings["attention"] = "xla"  # of ours, which is not run
    with tempfile.TemporaryDirectory() as folder:
        settings["save"] = f"{folder}/record.json"
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_step", *to_flags(settings)],
            cwd=Path(__file__).parents[1], env=memory | os.environ, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode == NO_MEMORY:
            return None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BenchmarkError(lines[-1].removeprefix("error: "), done.returncode)
        return json.loads(Path(settings["save"]).read_text())


def to_flags(settings: dict) -> list[str]:
    """The command line of what `parse` gives."""
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in settings.items()
    ]


def find_largest(fits: Callable[[int], bool], begin: int) -> int:
    """The largest multiple of UNIT that fits, 0 if none: doubles from `begin`, then bisects."""
    low, high, probe = 0, None, max(begin // UNIT, 1)
    while high is None or high - low > 1:
        if fits(probe * UNIT):
            low = probe
        else:
            high = probe
        probe = 2 * low if high is None else (low + high) // 2
    return low * UNIT


def run_largest(asked: argparse.Namespace) -> dict:
    """The record of methods at the largest batches that fit, in processes that take turns."""
    record = child(asked, batch=UNIT, repetitions=0)
    if record is None:
        raise BenchmarkError(f"not even batches of {UNIT} fit beside each other", NO_MEMORY)
    if record["device"] == "cpu" and not asked.most:
        raise BenchmarkError("--largest is for GPUs; on a CPU give --most, too", 2)
    names = [name for name, title in METHODS.items() if title in record["agreement"]]
    sizes, begin = {}, asked.batch
    for name in names:

        def fits(batch: int, name: str = name) -> bool:
            if asked.most and batch > asked.most:
                return False
            found = child(asked, only=name, batch=batch, steps=2, repetitions=1)
            print(f"{METHODS[name]}: {batch} {'do not fit' if found is None else 'fit'}")
            return found is not None

        begin = sizes[name] = find_largest(fits, begin)
        if not begin:
            raise BenchmarkError(f"not even {UNIT} fit in {METHODS[name]}", NO_MEMORY)
    record |= {"settings": vars(asked), "largest": {METHODS[n]: sizes[n] for n in names}}
    common = dict.fromkeys(names, min(sizes.values()))
    found = {case: [] for case in (*common.items(), *sizes.items())}
    for _ in range(asked.turns):
        for (name, batch), records in found.items():
            one = child(asked, only=name, batch=batch)
            if one is None:
                raise BenchmarkError(
                    f"{batch} fit once in {METHODS[name]}, but not again", NO_MEMORY
                )
            records.append(one)
    cases = {case: together(METHODS[case[0]], records) for case, records in found.items()}
    for label, batches in (("common", common), ("largest", sizes)):
        chosen = {METHODS[n]: (batch, *cases[n, batch]) for n, batch in batches.items()}
        record["rows"] += [row | {"batches": label} for row in summarise(record, chosen)]
    return record


def together(method: str, records: list[dict]) -> tuple[np.ndarray, int | None]:
    """(seconds of steps, peak bytes) of a method from the records of its turns."""
    seconds = np.concatenate([record["seconds"][method] for record in records])
    return seconds, records[-1]["memory"][method]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="dit", choices=NAMES)
    add("--size", default="S/2", help="as model.size: of a DiT S/2, of a UNet class or tiny")
    add("--batch", type=int, default=8, help="pictures a step; with --largest where to begin")
    add("--side", type=int, default=32, help="of the latents")
    add("--dtype", default="float32", choices=LIMITS, help="of compute; parameters are f32")
    add("--attention", default="auto", choices=BACKENDS, help="of ours, as model.attention")
    add("--remat", default="none", choices=REMAT, help="of ours, as model.remat")
    add("--unroll", type=int, default=1, help="of ours, as model.unroll")
    add("--repetitions", type=int, default=7, help="0: compare only")
    add("--steps", type=int, default=2, help="in a repetition")
    add("--cores", default="", help="to run on, as 0,1; all by default")
    add("--compile", action=switch, default=True)
    add("--largest", action=switch, default=False, help="GPUs: with the largest batches that fit")
    add("--most", type=int, default=0, help="--largest: largest batch to try; 0: no bound")
    add("--turns", type=int, default=2, help="--largest: processes of each method and batch")
    add("--only", default="", choices=("", *METHODS), help="one method, compared with no other")
    add("--save", nargs="?", default="", const=str(RESULTS), help=f"file, {RESULTS.name} if none")
    asked = parser.parse_args(arguments)
    for name, least in (("batch", 1), ("side", 1), ("repetitions", 0), ("steps", 1), ("turns", 1)):
        if getattr(asked, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return asked


def report(record: dict) -> None:
    """Print what was measured."""
    if record["rows"]:
        titles = ("batch", "images/s", "per CPU s", "s/step, extremes", "TFLOP/s", "MFU", "GiB")
        widths = (7, 10, 11, 18, 9, 7, 7)
        columns = "".join(f"{a:>{n}}" for a, n in zip(titles, widths, strict=True))
        print(f"{'':<26}{columns}{'speed against':>15}")
    for row in record["rows"]:
        spread = f"{row['least']:.3f}-{row['most']:.3f}"
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else ""
        memory = f"{row['memory_gib']:.1f}" if "memory_gib" in row else ""
        speed = ", ".join(f"{other} {value:.2f}" for other, value in row["speed"].items())
        print(
            f"{row['method']:<26}{row['batch']:>7}{row['images_per_second']:>10.2f}"
            f"{row['images_per_cpu_second']:>11.2f}{spread:>18}{row['tflops']:>9.3g}{mfu:>7}"
            f"{memory:>7}  {speed}"
        )
    for name, reason in record["left_out"].items():
        print(f"{name}: left out, {reason}")
    for name, found in (record["agreement"] | record["attention"]).items():
        print(f"first step, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))


def out_of_memory(error: Exception) -> bool:
    """Whether a framework means by this error that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0; 1 if the methods disagree, 2 for bad input, 3 if memory ran out."""
    asked = parse(arguments)
    try:
        record = run_largest(asked) if asked.largest else run(asked)
    except ConfigError as error:
        return fail(error)
    except BenchmarkError as error:
        fail(error)
        return error.code
    except Exception as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory at --batch={asked.batch}: {str(error)[:200]}")
        return NO_MEMORY
    report(record)
    if not agree(record, asked.dtype):
        fail(f"the methods disagree; the limits are {LIMITS[asked.dtype]}")
        return 1
    if asked.save:
        Path(asked.save).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    timing.restart()
    sys.exit(main())
