"""The end of mode prepare: shards get TFDS's names, and the folder its metadata."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

from condiff_jax import __version__
from condiff_jax.data.builders.shards import EXAMPLES, Job, add_skip, features, write_json
from condiff_jax.data.builders.units import OutputError, Plan, SourceError
from condiff_jax.data.records import by_frequency
from condiff_jax.data.tfds_source import BEGUN, INFO, words_file

MANIFEST = "manifest.json"
MAX_WORDS = 65_536  # kept of a split
PACKAGES = ("tensorflow_datasets", "array_record", "pillow")


def finish(out: Path, settings: dict, plan: Plan, jobs: list[Job]) -> dict:
    """Make a TFDS data set of the jobs' shards; the manifest. Killed at any time, it goes on.

    SourceError when no picture could be read.
    """
    work = out / BEGUN
    ledgers = [read_ledger(job, work) for job in jobs]
    shards = {split: [] for split in dict.fromkeys(job.split for job in jobs)}
    for job, ledger in zip(jobs, ledgers, strict=True):
        for number, row in enumerate(ledger["shards"]):
            shards[job.split].append(row | {"path": job.shard(work, number)})
    shards = {split: rows for split, rows in shards.items() if rows}
    manifest = create_manifest(settings, plan, jobs, ledgers, shards)
    if not shards:
        shutil.rmtree(work)
        reasons = ", ".join(f"{row['count']} {name}" for name, row in manifest["skipped"].items())
        raise SourceError(f"it holds no picture that can be used ({reasons or 'it is empty'})")
    for split, rows in shards.items():
        for number, row in enumerate(rows):
            move(row["path"], out / shard_name(settings["builder"], split, number, len(rows)))
    staged = work / "metadata"
    staged.mkdir(exist_ok=True)
    write_info(staged, settings["builder"], plan.classes, shards)
    for split in shards:
        words = by_frequency(total(ledgers, "words", split))[:MAX_WORDS]
        (staged / words_file(split)).write_text("\n".join(words) + "\n", encoding="utf-8")
    write_json(staged / MANIFEST, manifest, indent=1)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == INFO):  # INFO last
        os.replace(path, out / path.name)
    return manifest


def move(source: Path, target: Path) -> None:
    """Rename a shard unless that was done already."""
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        raise OutputError(f"{source} is missing; delete {target.parent} to prepare anew")


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """As TFDS names it."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_info(folder: Path, name: str, classes: tuple[str, ...], shards: dict) -> None:
    """TFDS's own description of the data set, by TFDS."""
    import tensorflow_datasets as tfds

    version = tfds.core.Version("1.0.0")
    identity = tfds.core.DatasetIdentity(
        name=name, version=version, data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features(classes),
        description=f"{name}, prepared by condiff_jax; manifest.json says from what.",
    )
    info.set_file_format("array_record")
    splits = []
    for split, rows in shards.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[row["records"] for row in rows],
                num_bytes=sum(row["bytes"] for row in rows),
                filename_template=template,
            )
        )
    info.set_splits(tfds.core.SplitDict(splits))
    info.write_to_directory(folder)


def create_manifest(
    settings: dict, plan: Plan, jobs: list[Job], ledgers: list[dict], shards: dict
) -> dict:
    """What was made, from what, and what was left out; the same for every run of one source."""
    skipped = {}
    for skip in plan.skipped:
        add_skip(skipped, skip.reason, 1, [skip.key])
    for ledger in ledgers:
        for reason, row in ledger["skipped"].items():
            add_skip(skipped, reason, row["count"], row["examples"])
    hashes = {name: value for ledger in ledgers for name, value in ledger["sha256"].items()}
    labels = {split: total(ledgers, "labels", split) for split in shards}
    return {
        "settings": settings,
        "images": {split: sum(row["records"] for row in rows) for split, rows in shards.items()},
        "classes": len(plan.classes),
        "images_of_a_class": {
            split: class_summary(counts, plan.classes) for split, counts in labels.items()
        }
        if plan.classes
        else {},
        "blurred": sum(ledger["blurred"] for ledger in ledgers),
        "repeated_keys": count_repeated(ledgers),
        "skipped": dict(sorted(skipped.items())),
        "sources": [
            {
                "name": unit.name,
                "split": unit.split,
                "size": unit.size,
                "mtime": unit.mtime,
                "metadata": unit.metadata(),
                "sha256": hashes[unit.name],
            }
            for job in jobs
            for unit in job.units
        ],
        "versions": {
            "condiff_jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }


def class_summary(counts: Counter, classes: tuple[str, ...]) -> dict:
    """Least, median and most pictures of a class; classes without any, the first few by name."""
    numbers = [counts[str(label)] for label in range(len(classes))]
    empty = [name for name, number in zip(classes, numbers, strict=True) if not number]
    return {
        "least": min(numbers),
        "median": statistics.median(numbers),
        "most": max(numbers),
        "empty": {"count": len(empty), "examples": empty[:EXAMPLES]},
    }


def count_repeated(ledgers: list[dict]) -> int:
    """Pictures whose key an earlier one has, of any split and archive."""
    keys = b"".join(base64.b64decode(ledger["keys"]) for ledger in ledgers)
    found = np.frombuffer(keys, np.uint64)  # hashes: of 12 million keys, two agree by 4e-6
    return len(found) - len(np.unique(found))


def total(ledgers: list[dict], name: str, split: str) -> Counter:
    """The sum of a split's counters in all ledgers; JSON has made their keys strings."""
    counts = Counter()
    for ledger in ledgers:
        if ledger["split"] == split:
            counts.update(ledger[name])
    return counts


def read_ledger(job: Job, work: Path) -> dict:
    """What a finished job did."""
    return json.loads(job.ledger(work).read_text(encoding="utf-8"))
