"""Builders of ImageNet-1k, from the official ILSVRC 2012 files, and ImageNet-22k, from class tars.

Labels are indices of the WordNet ids in alphabetical order, as is usual.
"""

import io
import re
import tarfile
from pathlib import Path

from condiff_jax.data.builders.units import (
    Item,
    Plan,
    Skip,
    SourceError,
    chunks,
    class_tars,
    file_as_tar,
    files_below,
    inner_tars,
    require,
    stem,
)
from condiff_jax.data.splits import first_split
from condiff_jax.data.tars import members

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = r"(n\d{8})\.tar"


def imagenet1k(source: Path) -> Plan:
    """Plan 1,281,167 training and 50,000 validation images; captions are the class names."""
    train, validation, devkit = (require(source, name) for name in (TRAIN, VALIDATION, DEVKIT))
    words, ids, truth = read_devkit(devkit)
    tars, skipped = inner_tars(train, CLASS_TAR)
    unknown = sorted(set(tars) - set(words))
    skipped += [Skip("unknown class", f"{TRAIN}/{name}.tar") for name in unknown]
    known = {name: tar for name, tar in tars.items() if name in words}
    units = class_tars("train", known, words)
    if not units:
        raise SourceError(f"{train} has no tars of the classes in {DEVKIT}; download it again")
    labels = {name: label for label, name in enumerate(sorted(words))}
    items = {}
    try:
        for member in members(validation):
            key = stem(member.name)
            number = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", stem(member.name, 0))
            if not number or not 1 <= int(number[1]) <= len(truth):
                skipped.append(Skip("wrong file name", stem(member.name, 0)))
            elif key in items:
                skipped.append(Skip("duplicate key", key))
            elif member.whole:
                name = ids[truth[int(number[1]) - 1]]
                items[key] = Item(
                    key,
                    path=validation,
                    size=member.size,
                    offset=member.offset,
                    caption=words[name],
                    label=labels[name],
                )
    except tarfile.ReadError:
        skipped.append(Skip("truncated tar", VALIDATION))
    if not items:
        raise SourceError(f"{validation} has no ILSVRC2012_val_########.JPEG; download it again")
    units += chunks(VALIDATION, "validation", items.values(), file_as_tar(validation).mtime)
    return Plan(units, tuple(sorted(words)), tuple(skipped))


def read_devkit(path: Path) -> tuple[dict[str, str], dict[int, str], list[int]]:
    """Read {WordNet id: words}, {ILSVRC id: WordNet id} and the validation images' ILSVRC ids."""
    import scipy.io

    try:
        with tarfile.open(path) as tar:
            files = {
                end: tar.extractfile(member).read()
                for member in tar
                for end in (META, TRUTH)
                if member.isreg() and member.name.endswith(end)
            }
        synsets = scipy.io.loadmat(io.BytesIO(files[META]), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        truth = [int(line) for line in files[TRUTH].split()]
        unknown = set(truth) - set(ids)
        if unknown:
            raise ValueError(f"{TRUTH} has the unknown class {min(unknown)}")
    except Exception as error:  # scipy can raise nearly anything on a damaged file
        reason = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise SourceError(f"{path} cannot be read ({reason}); download it again") from error
    return words, ids, truth


def imagenet22k(source: Path) -> Plan:
    """Plan all classes for training, from a folder of n########.tar or from one tar of these.

    The release of fall 2011, which the paper uses, has 21,841 classes. Tars in folders named after
    the validation or test split are skipped.
    """
    tars = {}
    skipped = []
    for path in files_below(source) if source.is_dir() else [source]:
        match = re.fullmatch(CLASS_TAR, path.name)
        if path.suffix != ".tar" and path != source:
            continue
        if not path.is_file():
            skipped.append(Skip("missing file", path.name))
            continue
        relative = path.relative_to(source)
        if (split := first_split(relative.parts[:-1])) not in (None, "train"):
            skipped.append(Skip(f"{split} split", relative.as_posix()))
            continue
        if match:
            new_tars = {match[1]: file_as_tar(path)}
        else:
            new_tars, bad_members = inner_tars(path, CLASS_TAR)
            skipped += bad_members
        duplicates = sorted(tars.keys() & new_tars.keys())
        skipped += [Skip("duplicate key", new_tars[name].name) for name in duplicates]
        tars = new_tars | tars
    if not tars:
        raise SourceError(
            f"{source} has no n########.tar, nor an uncompressed tar of these; give the folder of "
            "the class tars"
        )
    names = tuple(sorted(tars))
    return Plan(class_tars("train", tars, dict.fromkeys(names, "")), names, tuple(skipped))
