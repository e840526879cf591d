"""Mode `encode`: a cache of autoencoder moments, and of text features, to train from.

Pictures go into shards by their number, so what a shard holds is known before it is made. Until all
are there, the folder .encode says of what they are made (begun.json), and NUMBER.json (a ledger)
that a shard is whole; manifest.json comes last. Host p of P makes every P-th shard.
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
from condiff_jax.objectives.diffusion import DiffusionObjective
from condiff_jax.objectives.diffusion import create as create_system
from condiff_jax.objectives.vocabulary import create_vocabulary
from condiff_jax.pretrained import weights
from condiff_jax.runtime import sharding
from condiff_jax.runtime.distributed import barrier

DEFAULTS = Config()
HEAD = 400  # bytes of a picture's label, caption and control metadata, about
PACKAGES = ("jax", "flax", "array_record", "pillow", "simplejpeg", "opencv-python-headless")
# What training must have in common with its cache; the others belong to the cache alone.
IMAGE_FIELDS = ("data.resolution", "data.crop", "data.flip", "data.color")
IMAGE_FIELDS += ("autoencoder.name", "autoencoder.size", "autoencoder.path")
TEXT_FIELDS = ("text_encoder.length", "text_encoder.path")
SOURCE_FIELDS = ("data.name", "data.sizes", "data.classes", "data.entangled", "model.dtype", "seed")
SOURCE_FIELDS += ("encode.views", "encode.text", "encode.records", "encode.shard_mb")


def settings(objective: DiffusionObjective, fields: tuple[str, ...]) -> dict[str, Any]:
    """The values of config fields as JSON has them; of an encoder's path, its files' sha256."""
    encoders = {part.field: part for part in objective.frozen.values()}
    values = {
        field: weights.sha256(encoders[field].files())
        if field in encoders
        else get(objective.config, field)
        for field in fields
    }
    return json.loads(json.dumps(values))


def check(objective: DiffusionObjective, source: Cache) -> None:
    """ConfigError that names the field in which a cache is not what a config trains on."""
    asked = settings(objective, IMAGE_FIELDS + (TEXT_FIELDS if source.features else ()))
    for field, before, now in differing(source.manifest["settings"], asked):
        raise ConfigError(
            field,
            f"is {now}, but data.path={source.path} was encoded with {before}; restore it, or "
            "run mode encode into another folder",
        )


def differing(before: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, old value, new value) for people, where `settings` differ."""
    for field, value in now.items():
        # A config field that is newer than the cache had its default.
        old = before[field] if field in before or "." not in field else get(DEFAULTS, field)
        if old != value:
            kind = "sha256 {:.12}" if field.endswith(".path") else "{}"
            yield field, *(kind.format(one) for one in (str(old), str(value)))


@dataclasses.dataclass(frozen=True)
class Shard:
    """Pictures start to stop of the source, in file `number` of `count`."""

    number: int
    count: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.number:05d}-of-{self.count:05d}.array_record"

    def ledger(self, out: Path) -> Path:
        """The file that says that the shard is whole, and what became of its pictures."""
        return out / BEGUN / f"{self.number:05d}.json"


def shards_of(pictures: int, size: int, shard_mb: int) -> list[Shard]:
    """Shards of about equally many pictures of `size` bytes."""
    count = max(1, math.ceil(pictures * size / (shard_mb * MB)))
    ends = [pictures * number // count for number in range(count + 1)]
    spans = (span for span in itertools.pairwise(ends) if span[0] < span[1])
    return [Shard(n, min(count, pictures), *span) for n, span in enumerate(spans)]


@dataclasses.dataclass(frozen=True)
class ReadRecord:
    """Number of a picture -> all that is to be encoded of it, in fixed shapes."""

    source: Any
    settings: dict[str, Any]  # of `views`
    seed: int
    encode_text: Any = None  # caption -> (ids, mask)

    def __call__(self, i: int) -> dict:
        """The record of image i."""

        def code(record: dict) -> dict:
            images, controls = views(record, seed=(self.seed, i), **self.settings)
            return record | {"images": images, "controls": controls}

        record = read_record(self.source, i, code)
        out = {name: record[name] for name in ("label", "caption", "images", "controls")}
        out["broken"] = int(record.get("broken", 0))
        if self.encode_text is not None:
            out["ids"], out["mask"] = self.encode_text(record["caption"])
        return out


class Encoder:
    """The encoders of an objective on all devices of this host, for batches of one shape."""

    def __init__(self, objective: DiffusionObjective):
        self.objective, config = objective, objective.config
        mesh = sharding.local_mesh()
        self.views = config.encode.views * (1 + config.data.flip)
        self.batch = mesh.size * math.ceil(config.encode.batch_size / self.views / mesh.size)
        self.place = sharding.batch_sharding(mesh)
        parts = ("autoencoder", *(("text_encoder",) if config.encode.text else ()))
        params = {name: objective.frozen[name].load() for name in parts}
        self.params = jax.device_put(params, sharding.replicated(mesh))
        self.code = jax.jit(self._code, out_shardings=self.place)
        image = jax.ShapeDtypeStruct((1, *2 * (config.data.resolution,), 3), np.uint8)
        shapes = jax.eval_shape(objective.autoencoder.moments, params["autoencoder"], image)
        self.shape = shapes.shape[1:]  # of a view's moments, (h, w, C)

    @property
    def size(self) -> int:
        """Bytes that a picture takes with all views, about; captions fill a quarter of T."""
        config = self.objective.config
        length, width = config.text_encoder.length // 4 + 1, config.text_encoder.width
        features = length * width * FEATURES.itemsize * config.encode.text
        return HEAD + features + self.views * math.prod(self.shape) * MOMENTS.itemsize

    def _code(self, params: dict, batch: dict) -> dict:
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
        """Records of `Read`, each with what `pack` wants; two batches are under way at a time."""
        waiting: deque[tuple[list[dict], dict]] = deque()
        while records_now := list(itertools.islice(records, self.batch)):
            waiting.append((records_now, self.code(self.params, self._stack(records_now))))
            if len(waiting) > 1:
                yield from self._finish(*waiting.popleft())
        while waiting:
            yield from self._finish(*waiting.popleft())

    def _stack(self, records: list[dict]) -> dict:
        rows = [*records, *[records[-1]] * (self.batch - len(records))]
        names = ("images", "ids", "mask") if "ids" in records[0] else ("images",)
        batch = {name: np.stack([row[name] for row in rows]) for name in names}
        return jax.device_put(batch, self.place)

    def _finish(self, records: list[dict], coded: dict) -> Iterator[dict]:
        coded = jax.device_get(coded)
        if not np.isfinite(coded["moments"]).all():
            raise ConfigError(
                "autoencoder.path",
                "its moments are not finite in float16; are the weights whole?",
            )
        for row, record in enumerate(records):
            found = {name: record[name] for name in ("label", "caption", "controls", "broken")}
            found["moments"] = coded["moments"][row]
            if "tokens" in coded:
                tokens = coded["tokens"][row][record["mask"]]
                found["features"] = np.concatenate([tokens, coded["pooled"][row][None]])
            yield found


def run(config: Config) -> None:
    """Encode, resume, or notice that all is done."""
    _check_config(config)
    source = open_source(config)
    objective = create_system(config, create_vocabulary(config, source))
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
    print(
        f"Encoded in {out}: {manifest['pictures']:,} pictures, {manifest['views']} views of each."
    )
    if manifest["broken"]:
        print(f"Skipped {manifest['broken']:,} broken pictures; the log names them.")
    print(f"Train from it with --config.data.name=latents --config.data.path={out}")


def _check_config(config: Config) -> None:
    clip = config.text_encoder.name == "clip" and config.data.semantics == "text"
    endless = config.data.name == "shapes" and not config.encode.records
    for wrong, field, reason in (
        (not config.encode.path, "encode.path", "empty; mode encode needs it"),
        (config.autoencoder.name == "pixels", "autoencoder.name", "mode encode needs kl or vq"),
        (config.data.name == "latents", "data.name", "latents are encoded; name images"),
        (endless, "encode.records", "0 is all, but shapes is endless; set a number"),
        (
            config.encode.text and not clip,
            "encode.text",
            "needs data.semantics=text and text_encoder.name=clip",
        ),
    ):
        if wrong:
            raise ConfigError(field, reason)


def encode(objective: DiffusionObjective, source, out: Path) -> dict | None:
    """Make the cache `out` of a source, or go on with that; its manifest.

    None when it was finished before. OutputError or OSError for what a user can mend.
    """
    config, process = objective.config, jax.process_index()
    texts = TEXT_FIELDS if config.encode.text else ()
    made_of = settings(objective, IMAGE_FIELDS + texts + SOURCE_FIELDS)
    made_of |= {"data.path": fingerprint(source), "format": FORMAT}
    if (out / MANIFEST).exists():
        compare(out, json.loads((out / MANIFEST).read_text())["settings"], made_of)
        shutil.rmtree(out / BEGUN, ignore_errors=True)  # left when killed at the very end
        return None
    pictures = min(config.encode.records or len(source), len(source))
    encoder = Encoder(objective)
    shards = shards_of(pictures, encoder.size, config.encode.shard_mb)
    with locked(out, out / BEGUN, f"lock-{process}"):
        begun = out / BEGUN / "begun.json"
        if begun.exists():
            compare(out, json.loads(begun.read_text()), made_of)
        write_json(begun, made_of)
        work(encoder, source, out, shards[process :: jax.process_count()])
        barrier("encoded")
        return finish(encoder, source, out, shards, made_of) if process == 0 else {}


def compare(out: Path, before: dict, now: dict) -> None:
    """OutputError when a folder was begun with other settings."""
    for field, old, new in differing(before, now):
        raise OutputError(
            f"{out} was encoded with another {field} ({old}, not {new}); restore it or give "
            "another folder"
        )


def work(encoder: Encoder, source, out: Path, shards: list[Shard]) -> None:
    """Write those of this host's shards that are not there, each with its ledger; show a bar."""
    left = [shard for shard in shards if not shard.ledger(out).exists()]
    pictures = sum(shard.stop - shard.start for shard in left)
    size, free = pictures * encoder.size, shutil.disk_usage(out).free
    if size > free:
        raise OutputError(
            f"it needs about {format_bytes(size)}, and {out} has {format_bytes(free)} free; give a "
            "folder on a larger disk"
        )
    records, chief = read(encoder.objective, source, left), jax.process_index() == 0
    if chief and len(left) < len(shards):
        print(f"{len(shards) - len(left)} of {len(shards)} shards are done.", flush=True)
    with (
        tqdm(total=pictures * encoder.views, desc="encode", unit="img", disable=not chief) as bar,
        contextlib.closing(records),
    ):
        for shard in left:
            coded = encoder(itertools.islice(records, shard.stop - shard.start))
            write(coded, shard, out, partial(bar.update, encoder.views))


def read(objective: DiffusionObjective, source, left: list[Shard]) -> Iterator[dict]:
    """What `Read` gives for all pictures of these shards in order, read ahead in threads."""
    if not left:
        return
    config, data = objective.config, objective.config.data
    how = {"count": config.encode.views, "resolution": data.resolution, "crop": data.crop}
    how["flip"], how["color"] = data.flip, data.color
    text = objective.encode_text if config.encode.text else None
    spans = [grain.MapDataset.range(shard.start, shard.stop) for shard in left]
    dataset = grain.MapDataset.concatenate(spans).map(ReadRecord(source, how, config.seed, text))
    yield from read_ahead(dataset, data.workers)


def write(coded: Iterator[dict], shard: Shard, out: Path, step) -> None:
    """Write a shard, then its ledger: whatever ends it before leaves no trace to a reader."""
    kept = broken = 0

    def rows():
        nonlocal kept, broken
        for record in coded:
            step()
            broken += bool(record["broken"])
            if not record["broken"]:
                kept += 1
                yield from pack(record)

    records = rows()
    first = next(records, None)
    if first is not None:
        temporary = out / BEGUN / f"{shard.number:05d}.tmp"
        write_shard(temporary, first, records, math.inf)
        os.replace(temporary, out / shard.name)
    write_json(shard.ledger(out), {"name": shard.name, "pictures": kept, "broken": broken})


def finish(encoder: Encoder, source, out: Path, shards: list[Shard], made_of: dict) -> dict:
    """Write the manifest of a cache whose shards are all there."""
    config, text = encoder.objective.config, encoder.objective.config.text_encoder
    missing = [shard.name for shard in shards if not shard.ledger(out).exists()]
    if missing:
        raise OutputError(f"{missing[0]} is not there; do all hosts write into the same {out}?")
    rows = [json.loads(shard.ledger(out).read_text()) for shard in shards]
    pictures, broken = (sum(row[name] for row in rows) for name in ("pictures", "broken"))
    if not pictures:
        raise ConfigError("data.path", "has no image that can be decoded")
    manifest = {
        "settings": made_of,
        "pictures": pictures,
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
