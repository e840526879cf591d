"""Whether the tests find faults: `python -m benchmarks.mutations [--only=REGEX] [--out=FILE]`.

Each fault of faults/ changes one line of a formula. In a temporary copy of the repository
they are made one at a time, and the tests that guard the line are run: a fault that they pass has
survived. First they are run without any fault. Results go to benchmarks/results/mutations.json;
with --only, which chooses faults by name, to --out alone. Takes some seconds a fault, one process.
Exits with 1 if a fault has survived that is not noted as equivalent, and with 2 where that cannot
be told.
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
NEEDED = ("condiff_jax", "configs", "benchmarks", "tests", "pyproject.toml")


@contextlib.contextmanager
def copy() -> Iterator[Path]:
    """A temporary folder with what the tests need of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        for name in NEEDED:
            if (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, Path(folder, name), ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder)
        # Else told from its source by time and size, which a fault may leave as they are.
        by_content = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(folder, quiet=1, invalidation_mode=by_content)
        yield Path(folder)


@contextlib.contextmanager
def broken(root: Path, fault: Fault) -> Iterator[None]:
    """A copy of the repository with one fault, which is mended afterwards.

    ValueError unless the fault's text is in its file exactly once.
    """
    path = root / fault.file
    whole = path.read_text()
    if (count := whole.count(fault.text)) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has this {count} times, not once: "
                         f"{fault.text}")  # fmt: skip
    path.write_text(whole.replace(fault.text, fault.replacement))
    try:
        yield
    finally:
        path.write_text(whole)


def passed(root: Path, tests: Sequence[str]) -> bool:
    """Whether tests of a copy pass, up to the first that does not; RuntimeError if none is run."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(root / "programs"),
    }
    done = subprocess.run(
        [*command, *tests], cwd=root, env=environment, capture_output=True, text=True
    )
    if done.returncode > 1:
        raise RuntimeError(
            f"{' '.join(tests)} cannot be run: {(done.stdout + done.stderr)[-2000:]}"
        )
    return done.returncode == 0


def outcome(root: Path, fault: Fault) -> str:
    """`killed`, `survived`, or `equivalent` for a survivor that is noted as such."""
    with broken(root, fault):
        if not passed(root, fault.tests):
            return "killed"
    return "equivalent" if fault.equivalent else "survived"


def run(faults: Sequence[Fault]) -> list[dict]:
    """A record of each fault; RuntimeError if tests fail without any."""
    records = []
    with copy() as root:
        if not passed(root, sorted({test for fault in faults for test in fault.tests})):
            raise RuntimeError("the tests fail without any fault")
        for fault in faults:
            begun = time.perf_counter()
            found = outcome(root, fault)
            seconds = round(time.perf_counter() - begun, 1)
            print(f"{found:<10} {seconds:5.1f} s  {fault.file}: {fault.name}", flush=True)
            records.append(dataclasses.asdict(fault) | {"outcome": found, "seconds": seconds})
    return records


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 with survivors, 2 where tests do not run or pass without a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="regular expression that names must match")
    parser.add_argument("--out", type=Path, help=f"JSON file, {RESULTS.name} for all faults")
    asked = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if re.search(asked.only, f"{fault.file}: {fault.name}")]
    if not chosen:
        parser.error(f"--only={asked.only} matches no fault")
    try:
        records = run(chosen)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counts = collections.Counter(record["outcome"] for record in records)
    seconds = sum(record["seconds"] for record in records)
    print(", ".join(f"{n} {name}" for name, n in counts.items()), f"in {seconds / 60:.1f} minutes")
    if out := asked.out or (None if asked.only else RESULTS):
        from benchmarks import timing  # loads PyTorch

        about = timing.surroundings() | {"counts": counts, "faults": records}
        out.write_text(json.dumps(about, indent=1) + "\n")
    return 1 if counts["survived"] else 0


if __name__ == "__main__":
    compile_only()  # for `timing`: it looks for a device, and the tests run on CPUs
    sys.exit(main())
