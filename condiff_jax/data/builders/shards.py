"""A job of mode prepare: write units of one split, about one shard of data, as array_record."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from condiff_jax.data.builders.faces import blur, load_boxes
from condiff_jax.data.builders.units import Sample, Skip, Unit
from condiff_jax.data.images import decode, decode_error
from condiff_jax.data.records import count_words, open_shard

EXAMPLES = 20  # names listed for each reason of skipping
OPTIONS = "group_size:1,uncompressed"  # random access; images are already compressed


@dataclass(frozen=True)
class Settings:
    """Settings shared by all jobs, which write into `folder`."""

    folder: Path
    classes: tuple[str, ...]
    shard_bytes: int
    boxes: str = ""


@dataclass(frozen=True)
class Job:
    """Consecutive units of one split."""

    number: int
    units: tuple[Unit, ...]

    @property
    def split(self) -> str:
        """Split of its units."""
        return self.units[0].split

    @property
    def size(self) -> int:
        """Total size of its units in bytes."""
        return sum(unit.size for unit in self.units)

    def ledger(self, folder: Path) -> Path:
        """Path of the file that marks the job as done and records its results."""
        return folder / f"{self.number:05d}.json"

    def shard(self, folder: Path, number: int) -> Path:
        """Path of the job's shard `number`."""
        return folder / f"{self.number:05d}-{number:03d}.array_record"


def create_jobs(units: list[Unit], shard_bytes: int) -> list[Job]:
    """Group units in order, by split, into jobs of up to the size of a shard where possible."""
    groups: list[list[Unit]] = []
    for unit in sorted(units, key=lambda unit: unit.split):
        last = groups[-1] if groups else None
        fits = last and sum(u.size for u in last) + unit.size <= shard_bytes
        if fits and last[0].split == unit.split:
            last.append(unit)
        else:
            groups.append([unit])
    return [Job(number, tuple(group)) for number, group in enumerate(groups)]


class Tally:
    """Statistics of a job's samples."""

    def __init__(self):
        self.skipped: dict[str, dict] = {}
        self.labels: Counter = Counter()
        self.words: Counter = Counter()
        self.blurred: list[str] = []  # keys
        self.keys = bytearray()  # an 8 byte hash of each written sample's key

    def skip(self, skip: Skip) -> None:
        """Count a skipped sample."""
        add_skip(self.skipped, skip.reason, 1, [skip.key])


def add_skip(table: dict[str, dict], reason: str, count: int, keys: list[str]) -> None:
    """Add to {reason: {"count", "examples"}}, with at most EXAMPLES keys as examples."""
    row = table.setdefault(reason, {"count": 0, "examples": []})
    row["count"] += count
    row["examples"] += keys[: EXAMPLES - len(row["examples"])]


@functools.cache
def features(classes: tuple[str, ...]):
    """TFDS features of a record, the same for all builders."""
    import tensorflow_datasets as tfds

    size = tfds.features.Scalar(np.int32, doc="pixels of the original, upright")
    names = {"names": classes} if classes else {"num_classes": 1}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), doc="original file"),
            "caption": tfds.features.Text(doc="empty if there is none"),
            "label": tfds.features.ClassLabel(**names),
            "key": tfds.features.Text(doc="the sample's name in its source"),
            "height": size,
            "width": size,
        }
    )


@functools.cache
def serializer(classes: tuple[str, ...]):
    """Return a function from a record's features to its bytes, deterministic across processes."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    record_features = features(classes)
    protos = ExampleSerializer(record_features.get_serialized_info())

    def serialize(values: dict) -> bytes:
        proto = protos.get_tf_example(record_features.encode_example(values))
        return proto.SerializeToString(deterministic=True)

    return serialize


cached_boxes = functools.cache(load_boxes)  # read once per process


def examples(job: Job, settings: Settings, tally: Tally) -> Iterator[dict]:
    """Iterate over the features of each sample that the training code can decode."""
    boxes = cached_boxes(settings.boxes)
    samples = (sample for unit in job.units for sample in without_duplicates(unit.read()))
    for sample in samples:
        if isinstance(sample, Skip):
            tally.skip(sample)
            continue
        try:
            pixels = decode(sample.image)
        except Exception as error:  # Pillow can raise nearly anything on damaged files
            tally.skip(Skip(decode_error(error), sample.key))
            continue
        image = sample.image
        if sample.key in boxes:
            image = blur(pixels, boxes[sample.key])
            tally.blurred.append(sample.key)
        tally.labels[sample.label] += 1
        tally.keys += hashlib.blake2b(sample.key.encode(), digest_size=8).digest()
        tally.words.update(count_words([sample.caption]))
        height, width = sample.original or pixels.shape[:2]
        yield {
            "image": io.BytesIO(image), "caption": sample.caption, "label": sample.label,
            "key": sample.key, "height": height, "width": width,
        }  # fmt: skip


def without_duplicates(samples: Iterator[Sample | Skip]) -> Iterator[Sample | Skip]:
    """Replace samples of a unit by a Skip if an earlier one has the same key."""
    keys = set()
    for sample in samples:
        if isinstance(sample, Sample) and sample.key in keys:
            sample = Skip("duplicate key", sample.key)
        keys.add(sample.key)
        yield sample


def run_job(job: Job, settings: Settings) -> None:
    """Write the job's shards, then its ledger; without a ledger, the shards are ignored.

    A job of more than shard_bytes is split into shards of about equal size.
    """
    folder = settings.folder
    tally = Tally()
    parts = math.ceil(job.size / settings.shard_bytes)
    # Slightly more than a part, so that the overhead of records does not add a small last shard.
    limit = settings.shard_bytes if parts <= 1 else 1.05 * job.size / parts
    shards: list[dict] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of images that are skipped or harmless
        records = map(serializer(settings.classes), examples(job, settings, tally))
        first = next(records, None)
        while first is not None:
            temporary = folder / f"{uuid.uuid4().hex}.tmp"
            shard, first = write_shard(temporary, first, records, limit)
            os.replace(temporary, job.shard(folder, len(shards)))
            shards.append(shard)
    ledger = {
        "split": job.split,
        "shards": shards,
        "skipped": tally.skipped,
        "labels": tally.labels,
        "words": tally.words,
        "blurred": len(tally.blurred),
        "keys": base64.b64encode(tally.keys).decode(),
        "sha256": {unit.name: unit.sha256() for unit in job.units},
    }
    write_json(job.ledger(folder), ledger)


@contextlib.contextmanager
def array_record_errors():
    """Re-raise array_record's disk errors, which are RuntimeErrors, as OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write_shard(path: Path, first: bytes, records: Iterator[bytes], limit: float):
    """Write records, beginning with `first`, to a shard until it has `limit` bytes.

    Returns its {"records", "bytes"}, and the first record of the next shard, or None at the end.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), OPTIONS)
    record = first
    count = size = 0
    while record is not None and (not count or size < limit):
        with array_record_errors():
            writer.write(record)
        count += 1
        size += len(record)
        record = next(records, None)
    with array_record_errors():
        writer.close()
    if open_shard(str(path)).num_records() != count:
        raise OSError(f"{path} is incomplete after writing; is the disk full?")
    return {"records": count, "bytes": path.stat().st_size}, record


def write_json(path: Path, value, indent: int | None = None) -> None:
    """Write a JSON file atomically."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    os.replace(temporary, path)
