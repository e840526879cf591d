"""One job of mode prepare: units of a split, about a file's worth, become array_record shards."""

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

EXAMPLES = 20  # names kept of what is skipped for one reason
OPTIONS = "group_size:1,uncompressed"  # any record alone; pictures are compressed already


@dataclass(frozen=True)
class Settings:
    """What all jobs share; they write into `folder`."""

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
        """Of its units."""
        return self.units[0].split

    @property
    def size(self) -> int:
        """Of its units, bytes."""
        return sum(unit.size for unit in self.units)

    def ledger(self, folder: Path) -> Path:
        """The file that says that the job is done, and what it did."""
        return folder / f"{self.number:05d}.json"

    def shard(self, folder: Path, number: int) -> Path:
        """The job's shard `number`."""
        return folder / f"{self.number:05d}-{number:03d}.array_record"


def jobs_of(units: list[Unit], shard_bytes: int) -> list[Job]:
    """Units in their order, grouped by split to about the size of a shard."""
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
    """What happened to a job's samples."""

    def __init__(self):
        self.skipped: dict[str, dict] = {}
        self.labels, self.words, self.blurred = Counter(), Counter(), []
        self.keys = bytearray()  # 8 bytes of hash for each that is kept

    def skip(self, skip: Skip) -> None:
        """Count a sample that is left out."""
        add_skip(self.skipped, skip.reason, 1, [skip.key])


def add_skip(table: dict[str, dict], reason: str, count: int, keys: list[str]) -> None:
    """Add to {reason: {"count", "examples"}}, keeping the first EXAMPLES keys."""
    row = table.setdefault(reason, {"count": 0, "examples": []})
    row["count"] += count
    row["examples"] += keys[: EXAMPLES - len(row["examples"])]


@functools.cache
def features(classes: tuple[str, ...]):
    """TFDS's description of a record, the same for every builder."""
    import tensorflow_datasets as tfds

    size = tfds.features.Scalar(np.int32, doc="pixels of the original, upright")
    names = {"names": classes} if classes else {"num_classes": 1}
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3), doc="the file as it came"),
            "caption": tfds.features.Text(doc="empty where there is none"),
            "label": tfds.features.ClassLabel(**names),
            "key": tfds.features.Text(doc="the sample's name in its source"),
            "height": size,
            "width": size,
        }
    )


@functools.cache
def serializer(classes: tuple[str, ...]):
    """The features of a record -> its bytes, which are the same in every process."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    form = features(classes)
    protos = ExampleSerializer(form.get_serialized_info())

    def serialize(values: dict) -> bytes:
        proto = protos.get_tf_example(form.encode_example(values))
        return proto.SerializeToString(deterministic=True)

    return serialize


boxes_of = functools.cache(load_boxes)  # once in each process


def examples(job: Job, settings: Settings, tally: Tally) -> Iterator[dict]:
    """The features of each sample that decodes as it will in training."""
    boxes = boxes_of(settings.boxes)
    for found in (found for unit in job.units for found in once(unit.read())):
        if isinstance(found, Skip):
            tally.skip(found)
            continue
        try:
            pixels = decode(found.image)
        except Exception as error:  # damaged files make Pillow raise nearly anything
            tally.skip(Skip(decode_error(error), found.key))
            continue
        image = found.image
        if found.key in boxes:
            image = blur(pixels, boxes[found.key])
            tally.blurred.append(found.key)
        tally.labels[found.label] += 1
        tally.keys += hashlib.blake2b(found.key.encode(), digest_size=8).digest()
        tally.words.update(count_words([found.caption]))
        height, width = found.original or pixels.shape[:2]
        yield {
            "image": io.BytesIO(image), "caption": found.caption, "label": found.label,
            "key": found.key, "height": height, "width": width,
        }  # fmt: skip


def once(found: Iterator[Sample | Skip]) -> Iterator[Sample | Skip]:
    """The samples of a unit; of those that share a key, the first."""
    seen = set()
    for sample in found:
        if isinstance(sample, Sample) and sample.key in seen:
            sample = Skip("duplicate key", sample.key)
        seen.add(sample.key)
        yield sample


def run_job(job: Job, settings: Settings) -> None:
    """Write the job's shards, then its ledger: whatever ends it before leaves no trace to a reader.

    Shards of a job of more than shard_bytes are about equally long.
    """
    folder, tally = settings.folder, Tally()
    parts = math.ceil(job.size / settings.shard_bytes)
    # A little more than a part, so that records' overhead makes no small shard at the end.
    limit = settings.shard_bytes if parts <= 1 else 1.05 * job.size / parts
    shards: list[dict] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about what is counted or does no harm
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
def reporting():
    """What array_record says of a disk becomes an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


def write_shard(path: Path, first: bytes, records: Iterator[bytes], limit: float):
    """Write records up to `limit` bytes; {"records", "bytes"}, and the first one for the next."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, record, count, size = ArrayRecordWriter(str(path), OPTIONS), first, 0, 0
    while record is not None and (not count or size < limit):
        with reporting():
            writer.write(record)
        count, size = count + 1, size + len(record)
        record = next(records, None)
    with reporting():
        writer.close()
    if open_shard(str(path)).num_records() != count:
        raise OSError(f"{path} was not written whole; is the disk full?")
    return {"records": count, "bytes": path.stat().st_size}, record


def write_json(path: Path, value, indent: int | None = None) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
    temporary.write_text(json.dumps(value, indent=indent), encoding="utf-8")
    os.replace(temporary, path)
