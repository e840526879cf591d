"""Whether two checkouts give equal results: `python -m benchmarks.same_results BEFORE AFTER`.

For changes that must change no number. BEFORE and AFTER are folders of checkouts, such as from

    git worktree add ../before main

The same command lines train, resume, evaluate, sample and export tiny models in each of them, on
the CPU, and AFTER continues a run that BEFORE began. Their files are compared to the last digit,
with a line for each. `--out=DIR` keeps the files; DIR must be empty or absent.

Time measurements may differ. Changed source files and class names in an export are notes. Takes
about five minutes on two cores. Exits with 1 if anything differs, and with 2 if a run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from safetensors import safe_open

# Values of metrics.jsonl and evaluation.jsonl that depend on the clock or the machine.
CLOCK = {
    "step_time",
    "input_wait",
    "images_per_sec",
    "tflops_per_device",
    "mfu",
    "memory_gib",
    "seconds",
}
# Entries of model_index.json that name our own files and classes.
OWN_NAMES = ("._class_name[", ".network[")


class Run(NamedTuple):
    """A command line: the name of its work directory, its mode and its further flags.

    origin: a folder whose copy the run starts from, relative to the checkout's work directories.
    """

    workdir: str
    mode: str
    flags: tuple[str, ...] = ()
    origin: str = ""


def _config(**fields: Any) -> tuple[str, ...]:
    return tuple(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items())


# Flags of every run. All sampling has batches of eight, for which the sampler is compiled once.
# Without warm-up, images depend on the conditioning even after these few steps.
COMMON = _config(
    optimizer__warmup=0,
    log__samples=8,
    sampling__n=8,
    sampling__steps=5,
    evaluation__prompts=8,
    evaluation__samples=8,
    evaluation__size_prompts=8,
)
QUICKSTART = _config(steps=50, log__every=10, log__samples_every=25, checkpoint__every=25)
EVALUATE = _config(
    steps=50,
    evaluation__metrics="('prompt_accuracy','frechet_shapes','size_response')",
    sampling__seed=1,
    sampling__steps=4,
    sampling__sampler="ddpm",
)
SAMPLE = _config(
    steps=50,
    sampling__prompts="a red circle in the top left corner; blue ring right",
    sampling__seed=2,
    sampling__guidance=8,
    sampling__control_guidance=2,
    sampling__eta=0.5,
    sampling__size="train",
)
SHORT = _config(log__every=1, log__samples_every=0, evaluation__metrics="()")
RUNS = (
    Run("quickstart", "train", QUICKSTART),
    Run("quickstart", "evaluate", EVALUATE),
    Run("quickstart", "sample", SAMPLE),
    Run("quickstart", "export"),
    Run("bfloat16", "train", (*SHORT, *_config(steps=3, model__dtype="bfloat16"))),
    Run("begun", "train", (*SHORT, *_config(steps=10))),
    Run("resumed", "train", (*SHORT, *_config(steps=20)), origin="begun"),
    Run("resumed", "export", _config(convert__raw=True)),
)
# Only in AFTER, compared with BEFORE's `resumed`.
CONTINUED = (
    Run("continued", "train", (*SHORT, *_config(steps=20)), origin="../before/begun"),
    Run("continued", "export", _config(convert__raw=True)),
)
# Files to compare in each work directory; each pattern must match some.
RECORDS = ("metrics.jsonl", "vocabulary.json", "control.npy", "samples/**/*")
COMPARED = {
    "quickstart": (*RECORDS, "evaluation.jsonl", "export/**/*"),
    "bfloat16": RECORDS,
    "begun": RECORDS,
    "resumed": (*RECORDS, "export/**/*"),
}


def execute(run: Run, checkout: Path, out: Path) -> None:
    """Run one command line in a checkout, with its work directory in `out`; prints progress.

    RuntimeError with the end of its output if it fails.
    """
    print(f"{out.name}: {run.mode} {run.workdir} ...", end="", flush=True)
    workdir, log = out / run.workdir, out / f"{run.workdir}-{run.mode}.log"
    if run.origin:
        shutil.copytree(out / run.origin, workdir)
    command = [sys.executable, "-m", "condiff_jax.main", "--config=configs/quickstart.py"]
    command += [f"--workdir={workdir}", f"--mode={run.mode}", *COMMON, *run.flags]
    environment = os.environ | {
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",  # GPUs sum in any order
        "JAX_COMPILATION_CACHE_DIR": str(out / "programs"),  # separate for each checkout
    }
    start = time.perf_counter()
    with log.open("a") as file:
        process = subprocess.run(
            command, cwd=checkout, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    print(f" {time.perf_counter() - start:.0f} s", flush=True)
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command)} in {checkout} ended with code {process.returncode}: "
            f"{log.read_text()[-2000:]}"
        )


def json_differences(before: Any, after: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, value before, value after) for each difference between two JSON values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before:
            if key in after:
                yield from json_differences(before[key], after[key], f"{place}.{key}")
        if before.keys() != after.keys():
            gone, new = before.keys() - after.keys(), after.keys() - before.keys()
            yield f"{place} (fields that the other lacks)", sorted(gone), sorted(new)
    elif isinstance(before, list) and isinstance(after, list):
        for i, (old, new) in enumerate(zip(before, after, strict=False)):
            yield from json_differences(old, new, f"{place}[{i}]")
        if len(before) != len(after):
            yield f"{place} (length)", len(before), len(after)
    elif repr(before) != repr(after):  # so 1 and 1.0 differ, NaN and NaN do not
        yield place, before, after


def array_difference(before: np.ndarray, after: np.ndarray) -> str:
    """The number of values that differ in any bit, and the first of them; "" if none."""
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        return f"{before.dtype} {before.shape}, then {after.dtype} {after.shape}"
    size = before.dtype.itemsize
    rows = [np.frombuffer(a.tobytes(), np.uint8).reshape(-1, size) for a in (before, after)]
    changed = np.flatnonzero((rows[0] != rows[1]).any(1))
    if not len(changed):
        return ""
    values = before.flat[changed[0]].item(), after.flat[changed[0]].item()
    index = [int(i) for i in np.unravel_index(changed[0], before.shape)]
    return f"{len(changed)} of {before.size} values, at {index} {values[0]!r}, then {values[1]!r}"


def tensor_difference(before: Path, after: Path) -> str:
    """The first tensor that differs between two .safetensors files; "" if none."""
    with safe_open(before, "numpy") as old, safe_open(after, "numpy") as new:
        metadata = first(json_differences(old.metadata(), new.metadata(), "metadata"))
        if metadata:
            return metadata
        for name in sorted({*old.keys(), *new.keys()}):
            if name not in old.keys() or name not in new.keys():  # noqa: SIM118 (no mapping)
                return f"{name} is in one file only"
            if values := array_difference(old.get_tensor(name), new.get_tensor(name)):
                return f"{name}: {values}"
    return ""


def image_difference(before: Path, after: Path) -> str:
    """The first pixel [row, column, channel] that differs between two images; "" if none."""
    with Image.open(before) as old, Image.open(after) as new:
        if old.mode != new.mode:
            return f"{old.mode}, then {new.mode}"
        return array_difference(np.asarray(old), np.asarray(new))


def first(differences: Iterable[tuple[str, Any, Any]]) -> str:
    """The first of `json_differences` as text; "" if none."""
    for place, before, after in differences:
        return f"{place} {str(before)[:100]}, then {str(after)[:100]}"
    return ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, with None for time measurements."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: None if name in CLOCK else line[name] for name in line} for line in lines]


def difference(before: Path, after: Path) -> tuple[str, list[str]]:
    """The first difference of two files of the same name ("" if equal), and notes."""
    if before.suffix == ".py":  # an export's copy of our source
        same = before.read_bytes() == after.read_bytes()
        return "", [] if same else ["other source"]
    if before.suffix == ".png":
        return image_difference(before, after), []
    if before.suffix == ".npy":
        return array_difference(np.load(before), np.load(after)), []
    if before.suffix == ".safetensors":
        return tensor_difference(before, after), []
    if before.suffix == ".jsonl":
        return first(json_differences(read_lines(before), read_lines(after))), []
    if before.suffix == ".json":
        values = (json.loads(path.read_text()) for path in (before, after))
        differences = list(json_differences(*values))
        names = []
        if before.name == "model_index.json":
            names = [difference for difference in differences if _is_own_name(*difference)]
        others = (difference for difference in differences if difference not in names)
        return first(others), [first([name]) for name in names]
    if before.read_bytes() != after.read_bytes():
        return "other content", []
    return "", []


def _is_own_name(place: str, before: Any, after: Any) -> bool:
    return place.startswith(OWN_NAMES) and isinstance(before, str) and isinstance(after, str)


def compare(before: Path, after: Path, patterns: Sequence[str]) -> list[bool]:
    """Whether each file of two work directories that matches a pattern is equal; prints each."""
    title, outcomes = before.name, []
    if before.name != after.name:
        title = f"{before.name}, {after.name}"

    def report(name: str, change: str, notes: Sequence[str] = ()) -> None:
        outcomes.append(not change)
        print(f"DIFFERENT: {title}: {name}: {change}" if change else f"equal: {title}: {name}")
        for note in notes:
            print(f"note: {title}: {name}: {note}")

    for pattern in patterns:
        old, new = (_files(folder, pattern) for folder in (before, after))
        if not old and not new:
            report(pattern, "in neither")
        for name in sorted({*old, *new}):
            if name in old and name in new:
                report(name, *difference(before / name, after / name))
                continue
            change = "only before" if name in old else "only after"
            if name.endswith(".py"):  # an export's copy of our source
                report(name, "", [change])
            else:
                report(name, change)
    return outcomes


def _files(folder: Path, pattern: str) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.glob(pattern) if path.is_file()]


def run(before: Path, after: Path, out: Path) -> list[bool]:
    """Execute all runs in both checkouts, within `out`: whether each file is equal."""
    outcomes = []
    for checkout, folder in ((before, out / "before"), (after, out / "after")):
        folder.mkdir(parents=True)
        for command in RUNS:
            execute(command, checkout, folder)
    for name, patterns in COMPARED.items():
        outcomes += compare(out / "before" / name, out / "after" / name, patterns)
    for command in CONTINUED:
        execute(command, after, out / "after")
    patterns = COMPARED["resumed"]
    return outcomes + compare(out / "before/resumed", out / "after/continued", patterns)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 if anything differs, 2 if a run fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="folder of a checkout")
    parser.add_argument("after", type=Path, help="folder of another checkout")
    parser.add_argument("--out", type=Path, help="folder to keep the files of the runs in")
    options = parser.parse_args(arguments)
    for checkout in (options.before, options.after):
        if not (checkout / "condiff_jax/main.py").is_file():
            parser.error(f"{checkout} is no checkout: it has no condiff_jax/main.py")
    if options.out and options.out.exists() and any(options.out.iterdir()):
        parser.error(f"--out={options.out} is not empty")
    with tempfile.TemporaryDirectory() as temporary:
        out = options.out or Path(temporary)
        try:
            outcomes = run(options.before.resolve(), options.after.resolve(), out.resolve())
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    different = outcomes.count(False)
    print(
        f"{different} of {len(outcomes)} DIFFERENT" if different else f"all {len(outcomes)} equal"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
