"""ImageNet-1k from the official files of ILSVRC 2012, and ImageNet-22k from its classes' tars.

Labels count the WordNet ids in alphabetical order, as everybody's do.
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
    files_below,
    inner_tars,
    need,
    span_of,
    stem,
)
from condiff_jax.data.splits import first_split
from condiff_jax.data.tars import members

TRAIN, VALIDATION = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = r"(n\d{8})\.tar"


def imagenet1k(source: Path) -> Plan:
    """1,281,167 and 50,000 pictures, where the files are whole; captions are the classes' words."""
    train, validation, devkit = (need(source, name) for name in (TRAIN, VALIDATION, DEVKIT))
    words, ids, truth = read_devkit(devkit)
    tars, skipped = inner_tars(train, CLASS_TAR)
    unknown = sorted(set(tars) - set(words))
    skipped += [Skip("unknown class", f"{TRAIN}/{name}.tar") for name in unknown]
    units = class_tars("train", {n: t for n, t in tars.items() if n in words}, words)
    if not units:
        raise SourceError(f"{train} holds no tars of the classes in {DEVKIT}; fetch it again")
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
                where = {"path": validation, "size": member.size, "offset": member.offset}
                rest = {"caption": words[name], "label": labels[name]}
                items[key] = Item(key, **where, **rest)
    except tarfile.ReadError:
        skipped.append(Skip("truncated tar", VALIDATION))
    if not items:
        raise SourceError(f"{validation} holds no ILSVRC2012_val_########.JPEG; fetch it again")
    units += chunks(VALIDATION, "validation", items.values(), span_of(validation).mtime)
    return Plan(units, tuple(sorted(words)), tuple(skipped))


def read_devkit(path: Path) -> tuple[dict[str, str], dict[int, str], list[int]]:
    """Words by WordNet id, WordNet ids by ILSVRC id, and the validation pictures' ILSVRC ids."""
    import scipy.io

    try:
        with tarfile.open(path) as tar:
            found = {
                end: tar.extractfile(member).read()
                for member in tar
                for end in (META, TRUTH)
                if member.isreg() and member.name.endswith(end)
            }
        synsets = scipy.io.loadmat(io.BytesIO(found[META]), squeeze_me=True)["synsets"]
        leaves = [row for row in synsets if int(row["num_children"]) == 0]
        words = {str(row["WNID"]): str(row["words"]) for row in leaves}
        ids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
        truth = [int(line) for line in found[TRUTH].split()]
        strangers = set(truth) - set(ids)
        if strangers:
            raise ValueError(f"{TRUTH} has the unknown class {min(strangers)}")
    except Exception as error:  # scipy raises nearly anything on a damaged file
        what = f"no {error.args[0]}" if isinstance(error, KeyError) else error
        raise SourceError(f"{path} cannot be read ({what}); fetch it again") from error
    return words, ids, truth


def imagenet22k(source: Path) -> Plan:
    """All classes for training, in a folder of n########.tar or in one tar of these.

    There are 21,841 classes in the release of fall 2011, which the paper uses. What a folder calls
    validation or test is left out.
    """
    tars, skipped = {}, []
    for path in files_below(source) if source.is_dir() else [source]:
        name = re.fullmatch(CLASS_TAR, path.name)
        if path.suffix != ".tar" and path != source:
            continue
        if not path.is_file():
            skipped.append(Skip("missing file", path.name))
            continue
        inside = path.relative_to(source)
        if (split := first_split(inside.parts[:-1])) not in (None, "train"):
            skipped.append(Skip(f"{split} split", inside.as_posix()))
            continue
        found, wrong = ({name[1]: span_of(path)}, []) if name else inner_tars(path, CLASS_TAR)
        again = sorted(tars.keys() & found.keys())
        skipped += [*wrong, *(Skip("duplicate key", found[name].name) for name in again)]
        tars = found | tars
    if not tars:
        raise SourceError(f"{source} holds no n########.tar, nor a plain tar of such")
    names = tuple(sorted(tars))
    return Plan(class_tars("train", tars, dict.fromkeys(names, "")), names, tuple(skipped))
