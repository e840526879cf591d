"""Mode `encode`: write a cache of autoencoder moments, and of text features, for training.

Images are assigned to shards by number, so that the contents of a shard are known beforehand. Until
the cache is complete, the folder .encode has the settings (begun.json) and a ledger NUMBER.json for
each finished shard. manifest.json is written last. Host p of P writes every P-th shard.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from condiff_jax import __version__
from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.schema import Config
from condiff_jax.data.builders.prepare import MB, format_bytes, locked
from condiff_jax.data.builders.shards import write_json, write_shard
from condiff_jax.data.builders.units import OutputError
from condiff_jax.data.latent_cache import (
    BEGUN,
    FEATURES,
    FORMAT,
    MANIFEST,
    MOMENTS,
    Cache,
    pack,
    views,
)
from condiff_jax.data.pipeline import open_source, read_ahead
from condiff_jax.data.records import fingerprint, read_record
from condiff_jax.objectives import diffusion
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.pretrained import weights
from condiff_jax.runtime import sharding
from condiff_jax.runtime.distributed import barrier

DEFAULTS = Config()
RECORD_BYTES = 400  # approximate size of an image's label, caption and control metadata
PACKAGES = ("jax", "flax", "array_record", "pillow", "simplejpeg", "opencv-python-headless")
# Training must agree with its cache on IMAGE_FIELDS and TEXT_FIELDS.
IMAGE_FIELDS = ("data.resolution", "data.crop", "data.flip", "data.color")
IMAGE_FIELDS += ("autoencoder.name", "autoencoder.size", "autoencoder.path")
TEXT_FIELDS = ("text_encoder.length", "text_encoder.path")
# A cache is only resumed with the same values of these, too.
SOURCE_FIELDS = ("data.name", "data.sizes", "data.classes", "data.entangled", "model.dtype", "seed")
SOURCE_FIELDS += ("encode.views", "encode.text", "encode.records", "encode.shard_mb")


def settings(objective: DiffusionObjective, fields: tuple[str, ...]) -> dict[str, Any]:
    """Values of config fields as in JSON; for the path of an encoder, the sha256 of its files."""
    encoders = {part.field: part for part in objective.frozen.values()}
    values = {}
    for field in fields:
        if field in encoders:
            values[field] = weights.sha256(encoders[field].files())
        else:
            values[field] = get(objective.config, field)
    return json.loads(json.dumps(values))  # tuples become lists


def check(objective: DiffusionObjective, source: Cache) -> None:
    """Raise ConfigError if a cache was encoded with other settings than the config has."""
    current = settings(objective, IMAGE_FIELDS + (TEXT_FIELDS if source.features else ()))
    for field, before, now in differences(source.manifest["settings"], current):
        raise ConfigError(
            field,
            f"is {now}, but data.path={source.path} was encoded with {before}; restore it, or "
            "run mode encode into another folder",
        )


def differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield (field, old value, new value), formatted, for each of `settings` that differs."""
    for field, value in now.items():
        # A config field that is newer than the cache had its default.
        old = before[field] if field in before or "." not in field else get(DEFAULTS, field)
        if old != value:
            form = "sha256 {:.12}" if field.endswith(".path") else "{}"
            yield field, form.format(str(old)), form.format(str(value))


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard: images start to stop of the source, in file `number` of `count`."""

    number: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Name of the shard's file."""
        return f"{self.number:05d}-of-{self.count:05d}.array_record"

    def ledger(self, out: Path) -> Path:
        """Path of the ledger: it exists if the shard is complete, and has its image counts."""
        return out / BEGUN / f"{self.number:05d}.json"


def plan_shards(images: int, size: int, shard_mb: int) -> list[Shard]:
    """Split images of `size` bytes into shards with about equal numbers of images."""
    count = max(1, math.ceil(images * size / (shard_mb * MB)))
    ends = [images * number // count for number in range(count + 1)]
    spans = (span for span in itertools.pairwise(ends) if span[0] < span[1])
    return [Shard(n, min(count, images), *span) for n, span in enumerate(spans)]


@dataclasses.dataclass(frozen=True)
class ReadRecord:
    """Function from an image's number to the arrays to encode, in fixed shapes."""

    source: Any
    settings: dict[str, Any]  # keyword arguments of `views`
    seed: int
    encode_text: Any = None  # caption -> (ids, mask)

    def __call__(self, i: int) -> dict:
        """Read image i and crop its views."""

        def add_views(record: dict) -> dict:
            images, controls = views(record, seed=(self.seed, i), **self.settings)
            return record | {"images": images, "controls": controls}

        record = read_record(self.source, i, add_views)
        out = {name: record[name] for name in ("label", "caption", "images", "controls")}
        out["broken"] = int(record.get("broken", 0))
        if self.encode_text is not None:
            out["ids"], out["mask"] = self.encode_text(record["caption"])
        return out


class Encoder:
    """Encoder of batches of one shape on all devices of this host."""

    def __init__(self, objective: DiffusionObjective):
        self.objective = objective
        config = objective.config
        mesh = sharding.local_mesh()
        self.views = config.encode.views * (1 + config.data.flip)
        self.batch = mesh.size * math.ceil(config.encode.batch_size / self.views / mesh.size)
        self.sharding = sharding.batch_sharding(mesh)
        parts = ("autoencoder", *(("text_encoder",) if config.encode.text else ()))
        params = {name: objective.frozen[name].load() for name in parts}
        self.params = jax.device_put(params, sharding.replicated(mesh))
        self.encode = jax.jit(self._encode, out_shardings=self.sharding)
        image = jax.ShapeDtypeStruct((1, *2 * (config.data.resolution,), 3), np.uint8)
        shapes = jax.eval_shape(objective.autoencoder.moments, params["autoencoder"], image)
        self.shape = shapes.shape[1:]  # (h, w, C) of the moments of a view

    @property
    def size(self) -> int:
        """Approximate bytes of an image with all views; captions fill about T / 4 tokens."""
        config = self.objective.config
        length, width = config.text_encoder.length // 4 + 1, config.text_encoder.width
        features = length * width * FEATURES.itemsize * config.encode.text
        return RECORD_BYTES + features + self.views * math.prod(self.shape) * MOMENTS.itemsize

    def _encode(self, params: dict, batch: dict) -> dict:
        images = batch["images"]  # (B, V, R, R, 3)
        flat = images.reshape(-1, *images.shape[2:])
        moments = self.objective.autoencoder.moments(params["autoencoder"], flat).astype(MOMENTS)
        out = {"moments": moments.reshape(*images.shape[:2], *moments.shape[1:])}
        if "ids" in batch:
            variables = {"params": params["text_encoder"]}
            text = self.objective.text_encoder.apply(variables, batch["ids"], batch["mask"])
            out |= {"tokens": text.tokens.astype(FEATURES), "pooled": text.pooled.astype(FEATURES)}
        return out

    def __call__(self, records: Iterator[dict]) -> Iterator[dict]:
        """Encode the records of `ReadRecord` for `pack`, with two batches in flight."""
        pending: deque[tuple[list[dict], dict]] = deque()
        while batch := list(itertools.islice(records, self.batch)):
            pending.append((batch, self.encode(self.params, self._stack(batch))))
            if len(pending) > 1:
                yield from self._finish(*pending.popleft())
        while pending:
            yield from self._finish(*pending.popleft())

    def _stack(self, records: list[dict]) -> dict:
        # The last record fills up a batch that is not full.
        rows = [*records, *[records[-1]] * (self.batch - len(records))]
        names = ("images", "ids", "mask") if "ids" in records[0] else ("images",)
        batch = {name: np.stack([row[name] for row in rows]) for name in names}
        return jax.device_put(batch, self.sharding)

    def _finish(self, records: list[dict], encoded: dict) -> Iterator[dict]:
        encoded = jax.device_get(encoded)
        if not np.isfinite(encoded["moments"]).all():
            raise ConfigError(
                "autoencoder.path",
                "its moments are not finite in float16; check that the weights are complete",
            )
        for row, record in enumerate(records):
            out = {name: record[name] for name in ("label", "caption", "controls", "broken")}
            out["moments"] = encoded["moments"][row]
            if "tokens" in encoded:
                tokens = encoded["tokens"][row][record["mask"]]
                out["features"] = np.concatenate([tokens, encoded["pooled"][row][None]])
            yield out


def run(config: Config) -> None:
    """Encode the data of a config, or resume; does nothing if the cache is complete."""
    _check_config(config)
    source = open_source(config)
    objective = diffusion.create(config, create_vocabulary(config, source))
    out = Path(config.encode.path).expanduser()
    try:
        manifest = encode(objective, source, out)
    except (OutputError, OSError) as error:
        raise ConfigError("encode.path", one_line(error)) from error
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on from there.")
    if jax.process_index():
        return
    if manifest is None:
        print(f"Nothing to do: {out} is encoded.")
        return
    print(f"Encoded in {out}: {manifest['pictures']:,} images, {manifest['views']} views of each.")
    if manifest["broken"]:
        print(f"Skipped {manifest['broken']:,} broken images; their names are in the log.")
    print(f"Train from it with --config.data.name=latents --config.data.path={out}")


def _check_config(config: Config) -> None:
    clip = config.text_encoder.name == "clip" and config.data.semantics == "text"
    endless = config.data.name == "shapes" and not config.encode.records
    for is_wrong, field, reason in (
        (not config.encode.path, "encode.path", "empty; mode encode needs it"),
        (config.autoencoder.name == "pixels", "autoencoder.name", "mode encode needs kl or vq"),
        (config.data.name == "latents", "data.name", "latents are encoded; set a source of images"),
        (endless, "encode.records", "0 is all, but shapes is endless; set a number"),
        (
            config.encode.text and not clip,
            "encode.text",
            "needs data.semantics=text and text_encoder.name=clip",
        ),
    ):
        if is_wrong:
            raise ConfigError(field, reason)


def encode(objective: DiffusionObjective, source, out: Path) -> dict | None:
    """Write the cache `out` of a source, or resume it; returns its manifest.

    Returns None if the cache was complete before. Raises OutputError or OSError for the user.
    """
    config, process = objective.config, jax.process_index()
    texts = TEXT_FIELDS if config.encode.text else ()
    current = settings(objective, IMAGE_FIELDS + texts + SOURCE_FIELDS)
    current |= {"data.path": fingerprint(source), "format": FORMAT}
    if (out / MANIFEST).exists():
        check_resumable(out, json.loads((out / MANIFEST).read_text())["settings"], current)
        shutil.rmtree(out / BEGUN, ignore_errors=True)  # remains after a kill at the very end
        return None
    images = min(config.encode.records or len(source), len(source))
    encoder = Encoder(objective)
    shards = plan_shards(images, encoder.size, config.encode.shard_mb)
    with locked(out, out / BEGUN, f"lock-{process}"):
        begun = out / BEGUN / "begun.json"
        if begun.exists():
            check_resumable(out, json.loads(begun.read_text()), current)
        write_json(begun, current)
        write_shards(encoder, source, out, shards[process :: jax.process_count()])
        barrier("encoded")
        if process:
            return {}
        return write_manifest(encoder, source, out, shards, current)


def check_resumable(out: Path, before: dict, now: dict) -> None:
    """Raise OutputError if a folder was begun with other settings."""
    for field, old, new in differences(before, now):
        raise OutputError(
            f"{out} was encoded with another {field} ({old}, not {new}); restore it or use "
            "another folder"
        )


def write_shards(encoder: Encoder, source, out: Path, shards: list[Shard]) -> None:
    """Write the missing ones of this host's shards with their ledgers; show progress."""
    missing = [shard for shard in shards if not shard.ledger(out).exists()]
    images = sum(shard.stop - shard.start for shard in missing)
    size, free = images * encoder.size, shutil.disk_usage(out).free
    if size > free:
        raise OutputError(
            f"the cache needs about {format_bytes(size)}, but {out} has {format_bytes(free)} free; "
            "use a folder on a larger disk"
        )
    records = read_records(encoder.objective, source, missing)
    chief = jax.process_index() == 0
    if chief and len(missing) < len(shards):
        print(f"{len(shards) - len(missing)} of {len(shards)} shards are done.", flush=True)
    with (
        tqdm(total=images * encoder.views, desc="encode", unit="img", disable=not chief) as bar,
        contextlib.closing(records),
    ):
        for shard in missing:
            encoded = encoder(itertools.islice(records, shard.stop - shard.start))
            write_encoded(encoded, shard, out, partial(bar.update, encoder.views))


def read_records(objective: DiffusionObjective, source, shards: list[Shard]) -> Iterator[dict]:
    """Yield the results of `ReadRecord` for the images of these shards, read ahead by threads."""
    if not shards:
        return
    config, data = objective.config, objective.config.data
    crops = {
        "count": config.encode.views,
        "resolution": data.resolution,
        "crop": data.crop,
        "flip": data.flip,
        "color": data.color,
    }
    text = objective.encode_text if config.encode.text else None
    spans = [grain.MapDataset.range(shard.start, shard.stop) for shard in shards]
    read = ReadRecord(source, crops, config.seed, text)
    dataset = grain.MapDataset.concatenate(spans).map(read)
    yield from read_ahead(dataset, data.workers)


def write_encoded(encoded: Iterator[dict], shard: Shard, out: Path, step) -> None:
    """Write a shard, then its ledger; readers ignore a shard that was interrupted before.

    step: called after each image.
    """
    images = broken = 0

    def rows():
        nonlocal images, broken
        for record in encoded:
            step()
            if record["broken"]:
                broken += 1
            else:
                images += 1
                yield from pack(record)

    records = rows()
    first = next(records, None)
    if first is not None:
        temporary = out / BEGUN / f"{shard.number:05d}.tmp"
        write_shard(temporary, first, records, math.inf)
        os.replace(temporary, out / shard.name)
    write_json(shard.ledger(out), {"name": shard.name, "pictures": images, "broken": broken})


def write_manifest(
    encoder: Encoder, source, out: Path, shards: list[Shard], encode_settings: dict
) -> dict:
    """Write the manifest of a cache with all its shards, and return it."""
    config, text = encoder.objective.config, encoder.objective.config.text_encoder
    missing = [shard.name for shard in shards if not shard.ledger(out).exists()]
    if missing:
        raise OutputError(
            f"{missing[0]} is missing; check that all hosts write into the same {out}"
        )
    rows = [json.loads(shard.ledger(out).read_text()) for shard in shards]
    images, broken = (sum(row[name] for row in rows) for name in ("pictures", "broken"))
    if not images:
        raise ConfigError("data.path", "has no image that can be decoded")
    manifest = {
        "settings": encode_settings,
        "pictures": images,
        "broken": broken,
        "views": encoder.views,
        "moments": encoder.shape,
        "features": [text.length, text.width] if config.encode.text else None,
        "shards": [row for row in rows if row["pictures"]],
        "classes": source.classes,
        "words": encoder.objective.vocabulary.words,
        "versions": {
            "condiff_jax": __version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
    }
    write_json(out / BEGUN / MANIFEST, manifest, indent=1)
    os.replace(out / BEGUN / MANIFEST, out / MANIFEST)
    shutil.rmtree(out / BEGUN, ignore_errors=True)
    return manifest
