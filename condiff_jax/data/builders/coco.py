"""COCO's pictures of 2014 with one caption each; FID and CLIP scores are over the validation's."""

import json
import zipfile
from pathlib import Path

import numpy as np

from condiff_jax.data.builders.units import Item, Plan, Skip, SourceError, chunks, need, text

FOLDERS = {"train": "train2014", "validation": "val2014"}
ARCHIVE = "annotations_trainval2014.zip"
SEED = 0  # of the choice among a picture's captions


def coco(source: Path) -> Plan:
    """One of about five captions a picture, drawn by its id, of the splits that are there."""
    units, skipped = [], []
    there = {split: f for split, f in FOLDERS.items() if has_pictures(source, f)}
    for split, folder in (there or {"validation": FOLDERS["validation"]}).items():
        pictures, items = need(source, folder, f"{folder}.zip"), {}
        images, captions = read_captions(source, f"captions_{folder}.json")
        files, mtime = find_pictures(pictures)
        for number, name in sorted(images, key=lambda image: image[1]):
            key, known = name.rsplit(".", 1)[0], captions.get(number, [])
            if key in items:
                skipped.append(Skip("duplicate key", key))
            elif name not in files:
                skipped.append(Skip("missing file", name))
            elif not known:
                skipped.append(Skip("no caption", key))
            else:
                chosen = known[int(np.random.default_rng([SEED, number]).integers(len(known)))]
                items[key] = Item(key, **files[name], caption=chosen)
        if not items:
            raise SourceError(f"{pictures} holds none of the pictures of captions_{folder}.json")
        units += chunks(pictures.name, split, items.values(), mtime)
    return Plan(units, skipped=tuple(skipped))


def has_pictures(source: Path, folder: str) -> bool:
    """Whether a split's pictures are there, in a folder or zipped."""
    return (source / folder).exists() or (source / f"{folder}.zip").exists()


def read_captions(source: Path, name: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Id and file name of each picture, and captions in their order by its id."""
    path = need(source, f"annotations/{name}", name, ARCHIVE)
    try:
        if path.name == ARCHIVE:
            with zipfile.ZipFile(path) as archive:
                data = json.loads(archive.read(f"annotations/{name}"))
        else:
            data = json.loads(path.read_bytes())
        captions = {}
        for entry in sorted(data["annotations"], key=lambda entry: entry["id"]):
            captions.setdefault(entry["image_id"], []).append(text(entry["caption"]).strip())
        return [(int(entry["id"]), text(entry["file_name"])) for entry in data["images"]], captions
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise SourceError(f"{path} is no {name} ({error}); fetch it again") from error


def find_pictures(path: Path) -> tuple[dict[str, dict], int]:
    """Where each file of the folder or zip lies, by name, and the newest's time of change in ns."""
    if path.is_dir():
        found = {entry.name: entry for entry in path.iterdir() if entry.is_file()}
        stats = {name: entry.stat() for name, entry in found.items()}
        files = {name: {"path": found[name], "size": stats[name].st_size} for name in found}
        return files, max((stat.st_mtime_ns for stat in stats.values()), default=0)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.rsplit("/", 1)[-1]: m for m in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{path} is truncated or no zip file ({error}); fetch it again"
        ) from error
    files = {
        name: {"path": path, "size": member.file_size, "member": member.filename}
        for name, member in members.items()
    }
    return files, path.stat().st_mtime_ns
