"""Which split a file belongs to, by the names of its folders and its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

# The words that people use. Images for testing are neither trained on nor measured with.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Such as trainval or valset, which are refused wherever they stand; valley where a name begins so.
JOINED = "(train|val|test|dev|eval){2,}|(train|val|test)(set|split|data|images?)"


def split_of(path: PurePath | str) -> str | None:
    """The split (train, validation or test) that a relative path names, None where it names none.

    The word may stand among others and beside digits: train.00000.tar, train2017/0.tar,
    cc3m-validation-0001.tar, ImageNetTrain.tar. ValueError where a folder or the file begins like a
    split and is none (trainval-0.tar, valley.tar), or where two are named (val/train-0.tar).
    """
    *folders, name = PurePath(path).parts
    splits = set()
    for part in (*folders, name.removesuffix(PurePath(name).suffix)):
        runs = re.findall(r"[^\W\d_]+", part)
        parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)  # of camel case
        found = {WORDS[word.lower()] for word in (*runs, *parts) if word.lower() in WORDS}
        first = re.match("train|val|test", runs[0].lower()) if runs else None
        if not found and (first or any(re.fullmatch(JOINED, run.lower()) for run in runs)):
            raise ValueError(
                f"{path}: {part!r} begins like a split and is none; rename it, such as to "
                "train-NAME, val-NAME or data-NAME"
            )
        splits |= found
    if len(splits) > 1:
        raise ValueError(f"{path} names two splits, {' and '.join(sorted(splits))}; rename it")
    return splits.pop() if splits else None


def split_of_folder(name: str) -> str | None:
    """The split of a folder that is called nothing else, such as Train, valid or val2017.

    Others may be classes, such as "bullet train".
    """
    runs = re.findall(r"[^\W\d_]+", name.lower())
    return WORDS.get(runs[0]) if len(runs) == 1 else None


def first_split(folders: Iterable[str]) -> str | None:
    """The split of the first of these folders that is called like one."""
    return next(filter(None, map(split_of_folder, folders)), None)


def by_split(root: Path, paths: Iterable[PurePath]) -> dict[str | None, list[PurePath]]:
    """Paths relative to the folder `root` by what `split_of` says.

    Where none names a split, all are of the one that the folder is called, or else train.
    """
    groups: dict[str | None, list[PurePath]] = {}
    for path in paths:
        groups.setdefault(split_of(path), []).append(path)
    if groups.keys() != {None}:
        return groups
    return {split_of_folder(root.absolute().name) or "train": groups[None]}
