"""Builder of COCO 2014 with one caption per image; FID and CLIP score use its validation split."""

import json
import zipfile
from pathlib import Path

import numpy as np

from condiff_jax.data.builders.units import Item, Plan, Skip, SourceError, chunks, require, text

FOLDERS = {"train": "train2014", "validation": "val2014"}
ARCHIVE = "annotations_trainval2014.zip"
SEED = 0  # of the choice among an image's captions


def coco(source: Path) -> Plan:
    """Plan the available splits, with one of about five captions per image, sampled by its id."""
    units = []
    skipped = []
    folders = {split: name for split, name in FOLDERS.items() if has_images(source, name)}
    for split, folder in (folders or {"validation": FOLDERS["validation"]}).items():
        location = require(source, folder, f"{folder}.zip")
        images, captions = read_captions(source, f"captions_{folder}.json")
        files, mtime = find_images(location)
        items = {}
        for image_id, name in sorted(images, key=lambda image: image[1]):
            key = name.rsplit(".", 1)[0]
            choices = captions.get(image_id, [])
            if key in items:
                skipped.append(Skip("duplicate key", key))
            elif name not in files:
                skipped.append(Skip("missing file", name))
            elif not choices:
                skipped.append(Skip("no caption", key))
            else:
                choice = int(np.random.default_rng([SEED, image_id]).integers(len(choices)))
                items[key] = Item(key, **files[name], caption=choices[choice])
        if not items:
            raise SourceError(
                f"{location} has none of the images of captions_{folder}.json; download it again"
            )
        units += chunks(location.name, split, items.values(), mtime)
    return Plan(units, skipped=tuple(skipped))


def has_images(source: Path, folder: str) -> bool:
    """Whether a split's images exist, as a folder or as a zip file."""
    return (source / folder).exists() or (source / f"{folder}.zip").exists()


def read_captions(source: Path, name: str) -> tuple[list[tuple[int, str]], dict[int, list[str]]]:
    """Read (id, file name) of each image, and {image id: captions in order of their ids}."""
    path = require(source, f"annotations/{name}", name, ARCHIVE)
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
        raise SourceError(f"{path} is not {name} ({error}); download it again") from error


def find_images(path: Path) -> tuple[dict[str, dict], int]:
    """Locate each file in a folder or zip by name; also return the latest mtime in ns."""
    if path.is_dir():
        entries = {entry.name: entry for entry in path.iterdir() if entry.is_file()}
        stats = {name: entry.stat() for name, entry in entries.items()}
        files = {name: {"path": entries[name], "size": stats[name].st_size} for name in entries}
        return files, max((stat.st_mtime_ns for stat in stats.values()), default=0)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.rsplit("/", 1)[-1]: m for m in archive.infolist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"{path} is truncated or not a zip file ({error}); download it again"
        ) from error
    files = {
        name: {"path": path, "size": member.file_size, "member": member.filename}
        for name, member in members.items()
    }
    return files, path.stat().st_mtime_ns
