"""Inference of a file's split (train, validation or test) from file and folder names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePath

# Images for testing are used neither for training nor for evaluation.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# Compounds such as trainval or valset are errors wherever they stand. Other words that begin like a
# split, such as valley, are errors only at the beginning of a name.
JOINED = "(train|val|test|dev|eval){2,}|(train|val|test)(set|split|data|images?)"


def split_of(path: PurePath | str) -> str | None:
    """Return the split (train, validation or test) that a relative path names, or None.

    The word may stand among others and next to digits: train.00000.tar, train2017/0.tar,
    cc3m-validation-0001.tar, ImageNetTrain.tar. ValueError if a folder or file name begins like a
    split without naming one (trainval-0.tar, valley.tar), or if the path names two splits
    (val/train-0.tar).
    """
    *folders, name = PurePath(path).parts
    splits = set()
    for part in (*folders, name.removesuffix(PurePath(name).suffix)):
        runs = re.findall(r"[^\W\d_]+", part)
        camel_case = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)
        named = {WORDS[word.lower()] for word in (*runs, *camel_case) if word.lower() in WORDS}
        prefix = re.match("train|val|test", runs[0].lower()) if runs else None
        if not named and (prefix or any(re.fullmatch(JOINED, run.lower()) for run in runs)):
            raise ValueError(
                f"{path}: {part!r} begins like a split but does not name one; rename it, for "
                "example to train-NAME, val-NAME or data-NAME"
            )
        splits |= named
    if len(splits) > 1:
        raise ValueError(f"{path} names two splits, {' and '.join(sorted(splits))}; rename it")
    return splits.pop() if splits else None


def split_of_folder(name: str) -> str | None:
    """Return the split of a folder whose whole name is a split, such as Train, valid or val2017.

    Folders with more words may be classes, such as "bullet train"; they give None.
    """
    runs = re.findall(r"[^\W\d_]+", name.lower())
    return WORDS.get(runs[0]) if len(runs) == 1 else None


def first_split(folders: Iterable[str]) -> str | None:
    """Return the split of the first folder that `split_of_folder` recognizes, or None."""
    return next(filter(None, map(split_of_folder, folders)), None)


def by_split(root: Path, paths: Iterable[PurePath]) -> dict[str | None, list[PurePath]]:
    """Group paths, relative to the folder `root`, by `split_of`.

    If no path names a split, all belong to the split that `root` is named after, or else to train.
    """
    groups: dict[str | None, list[PurePath]] = {}
    for path in paths:
        groups.setdefault(split_of(path), []).append(path)
    if groups.keys() != {None}:
        return groups
    return {split_of_folder(root.absolute().name) or "train": groups[None]}
