"""Last step of mode prepare: rename shards as TFDS does, and write the metadata."""

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
MAX_WORDS = 65_536  # stored per split
PACKAGES = ("tensorflow_datasets", "array_record", "pillow")


def finish(out: Path, settings: dict, plan: Plan, jobs: list[Job]) -> dict:
    """Turn the jobs' shards into a TFDS data set; returns the manifest.

    Can be repeated after an interruption at any time. SourceError if no image could be read.
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
        raise SourceError(f"the source has no usable image ({reasons or 'it is empty'})")
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
    """Rename a shard unless an interrupted run has done so."""
    if source.exists():
        os.replace(source, target)
    elif not target.exists():
        raise OutputError(f"{source} is missing; delete {target.parent} to prepare it again")


def shard_name(name: str, split: str, number: int, count: int) -> str:
    """File name of a shard, as TFDS names it."""
    return f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_info(folder: Path, name: str, classes: tuple[str, ...], shards: dict) -> None:
    """Write TFDS's metadata files."""
    import tensorflow_datasets as tfds

    version = tfds.core.Version("1.0.0")
    identity = tfds.core.DatasetIdentity(
        name=name, version=version, data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(
        builder=identity,
        features=features(classes),
        description=f"{name}, prepared by condiff_jax; manifest.json lists its sources.",
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
    """Summarize data set, sources and skipped samples; deterministic for a given source."""
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
    """Min, median and max images per class; number of empty classes and the first few names."""
    sizes = [counts[str(label)] for label in range(len(classes))]
    empty = [name for name, size in zip(classes, sizes, strict=True) if not size]
    return {
        "least": min(sizes),
        "median": statistics.median(sizes),
        "most": max(sizes),
        "empty": {"count": len(empty), "examples": empty[:EXAMPLES]},
    }


def count_repeated(ledgers: list[dict]) -> int:
    """Count images whose key an earlier image of any split and archive has."""
    keys = b"".join(base64.b64decode(ledger["keys"]) for ledger in ledgers)
    # 64-bit hashes: among 12 million keys, the probability of any collision is 4e-6.
    hashes = np.frombuffer(keys, np.uint64)
    return len(hashes) - len(np.unique(hashes))


def total(ledgers: list[dict], name: str, split: str) -> Counter:
    """Sum a split's counters over all ledgers; JSON has turned their keys into strings."""
    counts = Counter()
    for ledger in ledgers:
        if ledger["split"] == split:
            counts.update(ledger[name])
    return counts


def read_ledger(job: Job, work: Path) -> dict:
    """Read the ledger of a finished job."""
    return json.loads(job.ledger(work).read_text(encoding="utf-8"))
