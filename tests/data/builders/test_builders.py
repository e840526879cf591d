"""Each builder turns its official archives into a TFDS data set with the right records."""

import io
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from condiff_jax.data.builders import BUILDERS
from condiff_jax.data.builders.prepare import prepare
from condiff_jax.data.builders.units import SourceError
from condiff_jax.data.prepared import TFDS
from tests.data.builders import archives


def build(builder, source, out, **options):
    """The manifest, and per split the records as any user of TFDS reads them, by key."""
    manifest = prepare(builder, source, out, **{"processes": 1, **options})
    loaded = tfds.builder_from_directory(out)
    records = {}
    for split in loaded.info.splits:
        raw = loaded.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        records[split] = {record["key"].decode(): record for record in raw}
        assert len(records[split]) == len(raw) == manifest["images"][split]
    return manifest, loaded, records


def test_imagenet1k(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=2, validation=12)
    manifest, loaded, records = build("imagenet1k", source, tmp_path / "out")
    names = sorted(archives.WNIDS)
    assert loaded.info.features["label"].names == names
    assert manifest["images"] == {"train": 20, "validation": 12}
    for wnid in archives.WNIDS:
        for i in range(2):
            record = records["train"][f"{wnid}_{i}"]
            assert record["image"] == archives.jpeg(int(wnid[1:]) * 10 + i)  # as it came
            assert record["label"] == names.index(wnid)
            assert record["caption"].decode() == f"thing {wnid[-2:]}, a thing"
            assert (record["height"], record["width"]) == (20, 28)
    for i in range(12):  # the devkit's numbers follow another order than labels
        record = records["validation"][f"ILSVRC2012_val_{i + 1:08d}"]
        assert names[record["label"]] == archives.WNIDS[i % 10]
    assert manifest["images_of_a_class"]["train"]["least"] == 2
    assert manifest["images_of_a_class"]["validation"]["most"] == 2
    assert not manifest["skipped"]
    inner = next(s for s in manifest["sources"] if s["name"].endswith("n00000003.tar"))
    data = archives.class_tar("n00000003", 2)
    assert inner["size"] == len(data)
    assert inner["sha256"] == __import__("hashlib").sha256(data).hexdigest()
    assert [f.name for f in sorted((tmp_path / "out").iterdir())] == [
        "dataset_info.json", "features.json",
        "imagenet1k-train.array_record-00000-of-00001",
        "imagenet1k-validation.array_record-00000-of-00001",
        "label.labels.txt", "manifest.json", "words-train.txt", "words-validation.txt",
    ]  # fmt: skip
