"""Tests of splits inferred from shard names, by mode prepare and by data.name=webdataset."""

from pathlib import Path

import pytest
from absl import logging

from condiff_jax.data.builders.cc12m import cc12m
from condiff_jax.data.builders.units import SourceError
from condiff_jax.data.splits import split_of
from condiff_jax.data.webdataset import Webdataset
from tests.data.test_webdataset import samples, write_tar

PAIRS = [
    ("train.tar", "val.tar"),
    ("train.00000.tar", "val.00000.tar"),
    ("train-0.tar", "valid-0.tar"),
    ("train0.tar", "val0.tar"),
    ("train2017_0.tar", "val2017_0.tar"),
    ("cc3m-train-0001.tar", "cc3m-validation-0001.tar"),
    ("imagenet_train_000000.tar", "imagenet_dev_000000.tar"),
    ("00000_train.tar", "00000_val.tar"),
    ("TRAIN-0.TAR", "Val-0.tar"),
    ("train/00000.tar", "val/00000.tar"),
    ("Train/00000.tar", "Validation/00000.tar"),
    ("train2014/a.tar", "val2014/a.tar"),
    ("cc12m_train/00000.tar", "cc12m_holdout/00000.tar"),
    ("train/train-0.tar", "val/val-0.tar"),
    ("0train.tar", "0val.tar"),
    ("ImageNetTrain0.tar", "ImageNetVal0.tar"),
    ("train-00000-of-00002.tar", "validation-00000-of-00001.tar"),
    ("train-{000..012}.tar", "val-{000..012}.tar"),
]


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Function that creates a folder of tars; tar i has one image, with caption "picture i"."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(names):
        # Names of parent folders must not matter.
        root = tmp_path / "train" / "val-7" / "set"
        for i, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            write_tar(root / name, samples([i]))
        return root

    return make


def prepared(root):
    """Return {split: captions} that mode prepare reads, and {reason: names} that it skips."""
    plan = cc12m(root)
    captions = {}
    skipped = {}
    for unit in plan.units:
        captions.setdefault(unit.split, []).extend(sample.caption for sample in unit.read())
    for skip in plan.skipped:
        skipped.setdefault(skip.reason, []).append(skip.key)
    return captions, skipped


@pytest.mark.parametrize("train, validation", PAIRS)
def test_validation_shards_are_never_trained_on(make, train, validation):
    root = make([train, validation])
    assert list(Webdataset(root).captions()) == ["picture 0"]
    assert list(Webdataset(root, "validation").captions()) == ["picture 1"]
    assert prepared(root) == ({"train": ["picture 0"], "validation": ["picture 1"]}, {})


@pytest.mark.parametrize("names", [["00000.tar", "00001.tar"], ["train/0.tar", "train/1.tar"]])
def test_all_shards_are_for_training_if_no_name_has_another_split(make, names):
    root = make(names)
    assert list(Webdataset(root).captions()) == ["picture 0", "picture 1"]
    with pytest.raises(ValueError, match="has no validation shards, only train"):
        Webdataset(root, "validation")
    assert prepared(root)[0] == {"train": ["picture 0", "picture 1"]}


@pytest.mark.parametrize(
    "name, reason",
    [
        ("trainval-0.tar", "'trainval-0' begins like a split but does not name one; rename it"),
        ("coco_trainval2014_0.tar", "'coco_trainval2014_0' begins like a split"),
        ("a-valset.tar", "'a-valset' begins like a split"),
        ("valley-0.tar", "'valley-0' begins like a split"),
        ("validationset.tar", "'validationset' begins like a split"),
        ("tests/0.tar", "'tests' begins like a split"),
        ("val/train-0.tar", "names two splits, train and validation"),
        ("train-val-0.tar", "names two splits"),
        ("TRAINval.tar", "begins like a split"),
    ],
)
def test_ambiguous_names_are_errors(make, name, reason):
    root = make(["train-1.tar", name])
    with pytest.raises(ValueError, match=reason):
        Webdataset(root)
    with pytest.raises(SourceError, match=reason):
        cc12m(root)


@pytest.mark.parametrize("name, split", [("train", "train"), ("Val", "validation")])
def test_a_folder_named_after_a_split_is_that_split(make, name, split):
    root = make([f"{name}/0.tar"]) / name
    other = {"train": "validation", "validation": "train"}[split]
    assert len(Webdataset(root, split)) == 1
    with pytest.raises(ValueError, match=f"no {other} shards, only {split}"):
        Webdataset(root, other)
    assert prepared(root)[0] == {split: ["picture 0"]}


def test_words_that_only_contain_a_split_name_none():
    for name in (
        "constrained-0.tar",
        "latest.tar",
        "interval/0.tar",
        "a-valley.tar",
        "a.train.b.c",
    ):
        assert split_of(name) == ("train" if "train." in name else None)


def test_shards_without_a_split_next_to_others_are_reported(make):
    root = make(["train-0.tar", "more.tar"])
    with pytest.raises(ValueError, match="more.tar names no split, but other shards do"):
        Webdataset(root)
    assert prepared(root) == ({"train": ["picture 0"]}, {"wrong file name": ["more.tar"]})


def test_test_shards_are_ignored_and_counted(make, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    root = make(["train-0.tar", "test-0.tar", "test/1.tar"])
    assert list(Webdataset(root).captions()) == ["picture 0"]
    assert lines == [f"2 test shards of {root} are ignored"]
    expected = {"test split": ["test/1.tar", "test-0.tar"]}
    assert prepared(root) == ({"train": ["picture 0"]}, expected)
    (root / "train-0.tar").unlink()
    with pytest.raises(ValueError, match="has no train shards, only test"):
        Webdataset(root)


def test_links_have_the_split_of_their_own_name_not_of_their_target(make):
    root = make(["blobs/3f2a.tar", "blobs/77c0.tar"])
    snapshot = root / "snapshot"
    snapshot.mkdir()
    for name, blob in (("train-0.tar", "3f2a.tar"), ("val-0.tar", "77c0.tar")):
        (snapshot / name).symlink_to(Path("..", "blobs", blob))
    assert list(Webdataset(snapshot).captions()) == ["picture 0"]
    assert list(Webdataset(snapshot, "validation").captions()) == ["picture 1"]
