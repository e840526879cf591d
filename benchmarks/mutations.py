"""Whether the tests find faults: `python -m benchmarks.mutations [--only=REGEX] [--out=FILE]`.

Each fault of faults/ changes one line of a formula. Faults are made one at a time in a temporary
copy of the repository, and the tests of that line are run: if they pass, the fault has survived.
First they are run without any fault. Results go to benchmarks/results/mutations.json; with --only,
which selects faults by name, only to --out. Takes some seconds per fault, in one process. Exits
with 1 if a fault has survived that is not marked as equivalent, and with 2 if tests cannot run.
"""

from __future__ import annotations

import argparse
import collections
import compileall
import contextlib
import dataclasses
import json
import os
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.faults import FAULTS, Fault
from condiff_jax.runtime.process import compile_only

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/mutations.json"
COPIED = ("condiff_jax", "configs", "benchmarks", "tests", "pyproject.toml")


@contextlib.contextmanager
def copy() -> Iterator[Path]:
    """Make a temporary copy of the parts of the repository that tests need."""
    with tempfile.TemporaryDirectory() as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, Path(folder, name), ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder)
        # By default cached modules are checked by time and size, which a fault may leave unchanged.
        by_content = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder, quiet=1, invalidation_mode=by_content)
        yield Path(folder)


@contextlib.contextmanager
def broken(root: Path, fault: Fault) -> Iterator[None]:
    """Apply one fault to a copy of the repository, and undo it at the end.

    ValueError unless the fault's text is in its file exactly once.
    """
    path = root / fault.file
    source = path.read_text()
    if (count := source.count(fault.text)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has this {count} times, not once: "
                         f"{fault.text}")  # fmt: skip
    path.write_text(source.replace(fault.text, fault.replacement))
    try:
        yield
    finally:
        path.write_text(source)


def passed(root: Path, tests: Sequence[str]) -> bool:
    """Run tests of a copy up to the first failure: whether they pass; RuntimeError if none runs."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
    }
    process = subprocess.run(
        [*command, *tests], cwd=root, env=environment, capture_output=True, text=True
    )
    if process.returncode > 1:
        raise RuntimeError(
            f"{' '.join(tests)} cannot be run: {(process.stdout + process.stderr)[-2000:]}"
        )
    return process.returncode == 0


def outcome(root: Path, fault: Fault) -> str:
    """`killed`, `survived`, or `equivalent` for a survivor that is marked as such."""
    with broken(root, fault):
        if not passed(root, fault.tests):
            return "killed"
    return "equivalent" if fault.equivalent else "survived"


def run(faults: Sequence[Fault]) -> list[dict]:
    """Return a record of each fault; RuntimeError if tests fail without one."""
    records = []
    with copy() as root:
        if not passed(root, sorted({test for fault in faults for test in fault.tests})):
            raise RuntimeError("the tests fail without any fault")
        for fault in faults:
            start = time.perf_counter()
            result = outcome(root, fault)
            seconds = round(time.perf_counter() - start, 1)
            print(f"{result:<10} {seconds:5.1f} s  {fault.file}: {fault.name}", flush=True)
            records.append(dataclasses.asdict(fault) | {"outcome": result, "seconds": seconds})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 0, 1 with survivors, 2 if tests do not run or fail without a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression that names must match")
    parser.add_argument("--out", type=Path, help=f"JSON file, {RESULTS.name} for all faults")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if re.search(options.only, f"{fault.file}: {fault.name}")]
    if not faults:
        parser.error(f"--only={options.only} matches no fault")
    try:
        records = run(faults)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = collections.Counter(record["outcome"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    print(", ".join(f"{n} {name}" for name, n in counts.items()), f"in {seconds / 60:.1f} minutes")
    if out := options.out or (None if options.only else RESULTS):
        from benchmarks import timing  # loads PyTorch

        record = timing.surroundings() | {"counts": counts, "faults": records}
        out.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if counts["survived"] else 0


if __name__ == "__main__":
    compile_only()  # `timing` initializes JAX's device, and the tests run on CPUs
    sys.exit(main())
