"""Which split a file belongs to, by the names of its folders and its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePath

# The words that people use. Images for testing are neither trained on nor measured with.
WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval", "holdout"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_of(path: PurePath | str) -> str | None:
    """The split (train, validation or test) that a relative path names, None where it names none.

    The word may be followed by digits and stand among others: train.00000.tar, train2017/0.tar,
    cc3m-validation-0001.tar. ValueError where a folder or the file begins like a split and is none
    of them (trainval-0.tar), or where two are named (val/train-0.tar).
    """
    *folders, name = PurePath(path).parts
    splits = set()
    for part in (*folders, name.removesuffix(PurePath(name).suffix)):
        words = [word.rstrip("0123456789") for word in re.split(r"[\W_]+", part.lower())]
        found = {WORDS[word] for word in words if word in WORDS}
        if not found and re.match("train|val|test", words[0]):
            raise ValueError(
                f"{path}: {part!r} begins like a split and is none; rename it, such as to "
                "train-NAME, val-NAME or data-NAME"
            )
        splits |= found
    if len(splits) > 1:
        raise ValueError(f"{path} names two splits, {' and '.join(sorted(splits))}; rename it")
    return splits.pop() if splits else None


def by_split(paths: Iterable[PurePath]) -> dict[str | None, list[PurePath]]:
    """Relative paths by what `split_of` says; where none names a split all are train."""
    groups: dict[str | None, list[PurePath]] = {}
    for path in paths:
        groups.setdefault(split_of(path), []).append(path)
    return {"train": groups[None]} if groups.keys() == {None} else groups
