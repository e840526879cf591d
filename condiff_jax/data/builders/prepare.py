"""Mode prepare: execute a builder's plan by parallel, resumable jobs, and write metadata last.

Until then, all files are in the work folder .prepare: `begun.json` records source and settings, and
NUMBER.json (a job's ledger) marks the shards NUMBER-*.array_record of a job as complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config
from condiff_jax.data.builders import BUILDERS, finish
from condiff_jax.data.builders.faces import load_boxes
from condiff_jax.data.builders.shards import Job, Settings, create_jobs, run_job, write_json
from condiff_jax.data.builders.units import BoxesError, OutputError, SourceError, Unit, short_hash
from condiff_jax.data.tfds_source import BEGUN, INFO
from condiff_jax.data.workers import follow_parent

MB = 10**6
RECORD = 400  # approximate bytes of a record besides its image


def prepare(
    builder: str,
    source: Path,
    out: Path,
    *,
    boxes: str = "",
    shard_mb: int = 256,
    processes: int = 0,
) -> dict | None:
    """Create the TFDS data set `out` from the source, or resume that; returns the manifest.

    None if it is already complete. SourceError or OutputError for errors that a user can fix.
    """
    settings = {"builder": builder, "shard_mb": shard_mb, "boxes": short_hash(load_boxes(boxes))}
    if (out / INFO).exists():
        check_finished(out, settings, BUILDERS[builder], source)
        return None
    if not source.exists():
        raise SourceError(f"{source} does not exist")
    try:
        plan = BUILDERS[builder](source)
    except OSError as error:
        raise SourceError(f"{error}; fix that and run the same command again") from error
    work = out / BEGUN
    with locked(out, work):
        begin(work, settings, plan.units)
        jobs = create_jobs(plan.units, shard_mb * MB)
        remaining = [job for job in jobs if not job.ledger(work).exists()]
        if remaining:
            check_space(builder, out, jobs, remaining)
            job_settings = Settings(work, plan.classes, shard_mb * MB, boxes)
            execute(jobs, remaining, job_settings, processes or os.cpu_count() or 1)
        manifest = finish.finish(out, settings, plan, jobs)
        shutil.rmtree(work)
    return manifest


@contextlib.contextmanager
def locked(out: Path, work: Path, name: str = "lock") -> Iterator[None]:
    """Create the work folder and lock it; the system releases the lock when the process ends.

    name: of the lock file; processes that share the work have one each. OutputError if `out` has
    other files or is locked.
    """
    if out.exists() and not work.exists() and any(out.iterdir()):
        raise OutputError(f"{out} holds other files; give an empty or new folder")
    work.mkdir(parents=True, exist_ok=True)
    with open(work / name, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out} is being written by another process") from None
        yield


def begin(work: Path, settings: dict, units: list[Unit]) -> None:
    """Record source and settings, or check that they are unchanged; delete temporary files."""
    begun = work / "begun.json"
    if begun.exists():
        before = json.loads(begun.read_text())
        check_settings(work.parent, before["settings"], settings)
        ledgers = [json.loads(path.read_text()) for path in work.glob("[0-9]*.json")]
        hashes = {name: value for ledger in ledgers for name, value in ledger["sha256"].items()}
        check_units(work.parent, before["units"], units, hashes)
    write_json(begun, {"settings": settings, "units": fingerprints(units)})
    for path in work.glob("*.tmp"):
        path.unlink()


def fingerprints(units: list[Unit]) -> dict[str, list]:
    """Size, metadata hash and modification time of each unit, by name."""
    return {unit.name: [unit.size, unit.metadata(), unit.mtime] for unit in units}


def check_settings(out: Path, before: dict, now: dict) -> None:
    """Raise OutputError if the folder was begun with other settings."""
    for name, value in before.items():
        if value != now[name]:
            raise OutputError(
                f"{out} was prepared with another prepare.{name} ({value}, not {now[name]}); "
                "restore it or give another folder"
            )


def check_units(out: Path, before: dict, units: list[Unit], hashes: dict[str, str]) -> None:
    """Raise SourceError if units have changed; reads only finished ones with a new mtime.

    before: their `fingerprints`; hashes: SHA-256 of the finished units.
    """
    now = fingerprints(units)
    changed = sorted(before.keys() ^ now.keys())
    changed += [name for name in now if name in before and before[name][:2] != now[name][:2]]
    for unit in units if not changed else ():
        touched = before[unit.name] != now[unit.name] and unit.name in hashes
        if touched and unit.sha256() != hashes[unit.name]:
            changed.append(unit.name)
    if changed:
        raise SourceError(
            f"{changed[0]} has changed since {out} was begun; restore it, or delete that folder "
            "to prepare it again"
        )


def check_finished(out: Path, settings: dict, builder, source: Path) -> None:
    """Run `check_settings`, and `check_units` if the source still exists."""
    if not (out / finish.MANIFEST).exists():
        raise OutputError(
            f"{out} holds a data set that mode prepare has not made; give an empty or new folder"
        )
    shutil.rmtree(out / BEGUN, ignore_errors=True)  # remains if killed at the very end
    manifest = json.loads((out / finish.MANIFEST).read_text(encoding="utf-8"))
    check_settings(out, manifest["settings"], settings)
    try:
        units = builder(source).units
    except (SourceError, OSError):
        return  # a complete data set does not need its source
    rows = manifest["sources"]
    before = {row["name"]: [row["size"], row["metadata"], row["mtime"]] for row in rows}
    check_units(out, before, units, {row["name"]: row["sha256"] for row in rows})


def check_space(builder: str, out: Path, jobs: list[Job], remaining: list[Job]) -> None:
    """Print the disk space that the remaining jobs need; OutputError if there is less."""
    records = sum(unit.size // 5000 for job in remaining for unit in job.units)  # of 5 kB or more
    size = sum(job.size for job in remaining) + RECORD * records
    free = shutil.disk_usage(out).free
    text = f"about {format_bytes(size)}, and {out} has {format_bytes(free)} free"
    if size > free:
        raise OutputError(f"it needs {text}; give a folder on a larger disk")
    if remaining == jobs:
        print(f"Prepare {builder}: the whole needs {text}.", flush=True)
    else:
        done = f"{len(jobs) - len(remaining)} of {len(jobs)} parts are done"
        print(f"Prepare {builder}: {done}, the rest needs {text}.", flush=True)


def format_bytes(size: float) -> str:
    """Format a number of bytes, such as 1.5 GB."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    unit, name = next((u for u in units if size >= u[0]), units[-1])
    return f"{size / unit:,.1f} {name}"


def execute(jobs: list[Job], remaining: list[Job], settings: Settings, processes: int) -> None:
    """Run the remaining jobs in parallel, with a progress bar in bytes of the source."""
    images = 0
    total = sum(job.size for job in jobs)
    done = total - sum(job.size for job in remaining)
    with tqdm(total=total, initial=done, desc="prepare", unit="B", unit_scale=True) as bar:
        for job in finished(remaining, settings, min(processes, len(remaining))):
            shards = finish.read_ledger(job, settings.folder)["shards"]
            images += sum(shard["records"] for shard in shards)
            rate = images / max(bar.format_dict["elapsed"], 1e-3)
            bar.set_postfix(images=images, img_s=f"{rate:.0f}", refresh=False)
            bar.update(job.size)


def finished(remaining: list[Job], settings: Settings, processes: int) -> Iterator[Job]:
    """Run jobs and iterate over them as they finish; SourceError or OutputError if one fails."""
    try:
        if processes <= 1:
            for job in remaining:
                run_job(job, settings)
                yield job
            return
        context = multiprocessing.get_context("spawn")  # threads and locks do not survive a fork
        with ProcessPoolExecutor(processes, context, initializer=follow_parent) as pool:
            futures = {pool.submit(run_job, job, settings): job for job in remaining}
            try:
                for future in as_completed(futures):
                    future.result()
                    yield futures[future]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    except BrokenProcessPool as error:
        raise OutputError(
            "a process was killed, possibly for lack of memory; lower prepare.processes and run "
            "the same command to resume"
        ) from error
    except OSError as error:
        path = getattr(error, "filename", None) or settings.folder
        kind = OutputError if Path(path).is_relative_to(settings.folder) else SourceError
        raise kind(f"{error}; fix that and run the same command to resume") from error


def report(manifest: dict | None, builder: str, out: Path) -> None:
    """Print a summary of the manifest; truncated tars are reported on stderr."""
    if manifest is None:
        print(f"Nothing to do: {out} is already prepared.")
        return
    counts = ", ".join(f"{n:,} for {split}" for split, n in manifest["images"].items())
    classes = f", {manifest['classes']:,} classes" if manifest["classes"] else ""
    print(f"Prepared {builder} in {out}: {counts}{classes}.")
    if manifest["settings"]["boxes"] != short_hash({}):
        print(f"Blurred {manifest['blurred']:,} images listed in prepare.boxes.")
    if manifest["repeated_keys"]:
        print(f"Kept {manifest['repeated_keys']:,} images whose key another archive has, too.")
    for reason, row in manifest["skipped"].items():
        stream = sys.stderr if reason == "truncated tar" else sys.stdout
        names = ", ".join(row["examples"][:3]) + (", ..." if row["count"] > 3 else "")
        print(f"Skipped {row['count']:,} ({reason}): {names}", file=stream)


def run(config: Config) -> None:
    """Run mode `prepare`: create data.path from the archives in prepare.source, or resume that."""
    settings = config.prepare
    required = {
        "prepare.builder": settings.builder,
        "prepare.source": settings.source,
        "data.path": config.data.path,
    }
    for field, value in required.items():
        if not value:
            raise ConfigError(field, "empty; mode prepare needs it")
    out = Path(config.data.path).expanduser()
    try:
        manifest = prepare(
            settings.builder,
            Path(settings.source).expanduser(),
            out,
            boxes=settings.boxes,
            shard_mb=settings.shard_mb,
            processes=settings.processes,
        )
    except BoxesError as error:
        raise ConfigError("prepare.boxes", one_line(error)) from error
    except SourceError as error:
        raise ConfigError("prepare.source", one_line(error)) from error
    except (OutputError, OSError) as error:
        raise ConfigError("data.path", one_line(error)) from error
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from there.")
    report(manifest, settings.builder, out)
