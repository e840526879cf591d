"""Speed of a train step against PyTorch: `python -m benchmarks.train_step [--cores=0] [--save]`.

Latent diffusion for 1000 classes on one device: our `compile_step` against a usual PyTorch loop
around diffusers' DiT or UNet, eager and compiled. Weights, shapes, dtype and objective are the same
(a sample of the latents' moments, t, noise, dropped labels, squared error), as are Adam, the EMA of
the parameters and the norm of the gradient; the batch is on the device. Before timing, the loss and
the norm of the gradient of one step with the same noise must agree. The methods take turns;
compilation is not counted. FLOPs are three times those of the forward pass, without the
recomputation of --remat.

On CPUs, speeds are compared by CPU time, which other processes affect little. On a GPU:
`--size=XL/2 --dtype=bfloat16 --attention=auto --batch=128 --largest --save` searches the largest
batch of each method, from 128 on, and times each at its own and all at the smallest of them. Each
method has the GPU to itself, in one process after the other, so that all have the same memory.
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
    create_objective,
    create_params,
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
UNIT = 8  # largest batches are multiples of this
NO_MEMORY = 3  # exit code
SIGNS = ("RESOURCE_EXHAUSTED", "out of memory", "ALLOC_FAILED")  # of XLA, CUDA, cuBLAS and cuDNN


class BenchmarkError(Exception):
    """An error that ends the command with one line and an exit code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


def agreement(outputs: dict[str, dict[str, float]], expected: str) -> dict[str, dict[str, float]]:
    """Outputs of each method, with relative differences from those of the method `expected`."""
    first = outputs.get(expected, {})
    return {
        name: values | {f"{key}_error": abs(values[key] / first[key] - 1) for key in first}
        for name, values in outputs.items()
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
    """First loss and gradient norm of our step, with attention by plain XLA and by our backend."""
    batch, noise = create_batch(objective, size), objective.draw_noise(jax.random.key(0), size)
    params, outputs = jax.device_put(create_params(objective), jax.devices()[0]), {}
    for backend in ("xla", objective.model.backend):
        loss_fn = with_backend(objective, backend).loss
        (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, noise)
        outputs[backend] = {"loss": float(loss), "grad_norm": float(optax.global_norm(grads))}
    return agreement(outputs, "xla")


def summarize(record: dict, cases: dict) -> list[dict]:
    """A row for each of cases {method: (batch, seconds of steps (repetitions, 2), peak bytes)}.

    On CPUs, CPU time is compared. speed: relative to each of diffusers' methods, per image. Ratios
    are taken within each repetition, because the load of a machine changes more slowly.
    """
    clock = int(record["device"] == "cpu")
    per_image = {name: seconds[:, clock] / batch for name, (batch, seconds, _) in cases.items()}
    rows = []
    for name, (batch, seconds, memory) in cases.items():
        wall, cpu = np.median(seconds, axis=0)
        tflops = 3 * record["gflop_forward"] * batch / wall / 1e3
        row = {
            "method": name, "batch": batch, "images_per_second": batch / wall,
            "images_per_cpu_second": batch / cpu, "seconds": wall, "cpu_seconds": cpu,
            "least": seconds[:, clock].min(), "most": seconds[:, clock].max(), "tflops": tflops,
            "speed": {
                other: np.median(per_image[other] / per_image[name])
                for other in (THEIRS, COMPILED) if other in per_image
            },
        }  # fmt: skip
        if (
            record["peak_tflops"] and record["settings"]["dtype"] == "bfloat16"
        ):  # the peak is that of bfloat16
            row["mfu"] = tflops / record["peak_tflops"]
        if memory:
            row["memory_gib"] = memory / 2**30
        rows.append(row)
    return rows


def run(options: argparse.Namespace) -> dict:
    """Return the record of methods that take turns in this process, untimed if they disagree."""
    torch_only = options.only in ("eager", "compile")  # then PyTorch has the GPU
    if torch_only:
        jax.config.update("jax_platforms", "cpu")
    gpu = timing.start(options.cores) or (torch_only and torch.cuda.is_available())
    with timing.precision(options.dtype):
        objective = create_objective(options)
        gflop = objective.forward_flops() / 1e9
        record = timing.surroundings() | {"settings": vars(options), "gflop_forward": gflop}
        record |= {"peak_tflops": flops.peak_tflops(), "attention": {}, "rows": []}
        if not options.only and objective.model.backend != "xla":
            record["attention"] = compare_attention(objective, min(options.batch, UNIT))
        methods = create_methods(options, objective, "cuda" if gpu else "cpu")
        outputs, record["left_out"] = timing.warm_up({n: m.first for n, m in methods.items()})
        record["agreement"] = agreement(outputs, OURS)
        if not options.repetitions or not agree(record, options.dtype):
            return record
        record["memory"] = {name: methods[name].peak() for name in outputs}
        seconds = timing.measure({name: methods[name].run for name in outputs}, options.repetitions)
    seconds = {name: values / options.steps for name, values in seconds.items()}
    cases = {name: (options.batch, seconds[name], record["memory"][name]) for name in outputs}
    record["seconds"] = {name: values.tolist() for name, values in seconds.items()}
    return record | {"rows": summarize(record, cases)}


def child(options: argparse.Namespace, **changes) -> dict | None:
    """Run this command with other flags in a process: its record, or None if out of memory."""
    settings, memory = vars(options) | {"largest": False} | changes, {}
    if settings["only"] == "ours":  # PyTorch needs none
        memory = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    elif settings["only"]:
        settings["attention"] = "xla"  # a setting of ours, which does not run
    with tempfile.TemporaryDirectory() as folder:
        settings["save"] = f"{folder}/record.json"
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.train_step", *to_flags(settings)],
            cwd=Path(__file__).parents[1], env=memory | os.environ, capture_output=True, text=True,
        )  # fmt: skip
        if process.returncode == NO_MEMORY:
            return None
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["no message"]
            raise BenchmarkError(lines[-1].removeprefix("error: "), process.returncode)
        return json.loads(Path(settings["save"]).read_text())


def to_flags(settings: dict) -> list[str]:
    """The command line that `parse` turns into these settings."""
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


def run_largest(options: argparse.Namespace) -> dict:
    """Return the record of methods at the largest batches that fit, in processes in turn."""
    record = child(options, batch=UNIT, repetitions=0)
    if record is None:
        raise BenchmarkError(f"batches of {UNIT} of all methods do not fit together", NO_MEMORY)
    if record["device"] == "cpu" and not options.most:
        raise BenchmarkError("--largest is for GPUs; on a CPU give --most, too", 2)
    names = [name for name, title in METHODS.items() if title in record["agreement"]]
    sizes, begin = {}, options.batch
    for name in names:

        def fits(batch: int, name: str = name) -> bool:
            if options.most and batch > options.most:
                return False
            trial = child(options, only=name, batch=batch, steps=2, repetitions=1)
            print(f"{METHODS[name]}: {batch} {'do not fit' if trial is None else 'fit'}")
            return trial is not None

        begin = sizes[name] = find_largest(fits, begin)
        if not begin:
            raise BenchmarkError(f"not even {UNIT} fit in {METHODS[name]}", NO_MEMORY)
    record |= {"settings": vars(options), "largest": {METHODS[n]: sizes[n] for n in names}}
    common = dict.fromkeys(names, min(sizes.values()))
    turns = {case: [] for case in (*common.items(), *sizes.items())}
    for _ in range(options.turns):
        for (name, batch), records in turns.items():
            turn = child(options, only=name, batch=batch)
            if turn is None:
                raise BenchmarkError(
                    f"{batch} fit once in {METHODS[name]}, but not again", NO_MEMORY
                )
            records.append(turn)
    cases = {case: merge_turns(METHODS[case[0]], records) for case, records in turns.items()}
    for label, batches in (("common", common), ("largest", sizes)):
        chosen = {METHODS[n]: (batch, *cases[n, batch]) for n, batch in batches.items()}
        record["rows"] += [row | {"batches": label} for row in summarize(record, chosen)]
    return record


def merge_turns(method: str, records: list[dict]) -> tuple[np.ndarray, int | None]:
    """(seconds of steps, peak bytes) of a method from the records of its turns."""
    seconds = np.concatenate([record["seconds"][method] for record in records])
    return seconds, records[-1]["memory"][method]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", default="dit", choices=NAMES)
    add("--size", default="S/2", help="as model.size: of a DiT S/2, of a UNet class or tiny")
    add("--batch", type=int, default=8, help="images per step; with --largest the first to try")
    add("--side", type=int, default=32, help="side of the latents")
    add("--dtype", default="float32", choices=LIMITS, help="of the computation; parameters are f32")
    add("--attention", default="auto", choices=BACKENDS, help="of ours, as model.attention")
    add("--remat", default="none", choices=REMAT, help="of ours, as model.remat")
    add("--unroll", type=int, default=1, help="of ours, as model.unroll")
    add("--repetitions", type=int, default=7, help="0: compare only")
    add("--steps", type=int, default=2, help="steps in a repetition")
    add("--cores", default="", help="to run on, as 0,1; all by default")
    add("--compile", action=switch, default=True)
    add("--largest", action=switch, default=False, help="GPUs: with the largest batches that fit")
    add("--most", type=int, default=0, help="--largest: largest batch to try; 0: no bound")
    add("--turns", type=int, default=2, help="--largest: processes of each method and batch")
    add("--only", default="", choices=("", *METHODS), help="run one method, without comparison")
    add("--save", nargs="?", default="", const=str(RESULTS), help=f"file, {RESULTS.name} if none")
    options = parser.parse_args(arguments)
    for name, minimum in (
        ("batch", 1),
        ("side", 1),
        ("repetitions", 0),
        ("steps", 1),
        ("turns", 1),
    ):
        if getattr(options, name) < minimum:
            parser.error(f"--{name} must be at least {minimum}")
    return options


def report(record: dict) -> None:
    """Print a record."""
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
    for name, values in (record["agreement"] | record["attention"]).items():
        print(f"first step, {name}: " + ", ".join(f"{k} {v:.3g}" for k, v in values.items()))


def out_of_memory(error: Exception) -> bool:
    """Whether this error of a framework means that memory ran out."""
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in SIGNS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0; 1 if methods disagree, 2 for bad input, 3 if out of memory."""
    options = parse(arguments)
    try:
        record = run_largest(options) if options.largest else run(options)
    except ConfigError as error:
        return fail(error)
    except BenchmarkError as error:
        fail(error)
        return error.code
    except Exception as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory at --batch={options.batch}: {str(error)[:200]}")
        return NO_MEMORY
    report(record)
    if not agree(record, options.dtype):
        fail(f"the methods disagree; the limits are {LIMITS[options.dtype]}")
        return 1
    if options.save:
        Path(options.save).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    timing.restart()
    sys.exit(main())
