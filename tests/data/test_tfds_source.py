"""Tests of reading data sets in TFDS's format, written by mode prepare and by TFDS itself."""

import contextlib
import io
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter

from condiff_jax.data.augment import augment
from condiff_jax.data.builders.prepare import prepare
from condiff_jax.data.images import decode
from condiff_jax.data.pipeline import batches, create_source
from condiff_jax.data.tfds_source import TFDS
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import create_vocabulary
from configs import cifar10_conditioning
from tests import tiny
from tests.data.builders import archives

NAMES = ("airplane", "big_dog", "dog")


def of_tfds(folder, name, version, features, splits):
    """Write a data set in the layout that TFDS uses; splits: {name: examples}."""
    path = folder / name / version
    path.mkdir(parents=True)
    features = tfds.features.FeaturesDict(features)
    infos = []
    for split, examples in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=path, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        lengths = []
        for number, part in enumerate((examples[::2], examples[1::2])):
            file = path / f"{name}-{split}.array_record-{number:05d}-of-00002"
            writer = ArrayRecordWriter(str(file), "group_size:1")
            for example in part:
                writer.write(features.serialize_example(example))
            writer.close()
            lengths.append(len(part))
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=1, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=path, features=features, split_infos=infos, version=version, check_data=False
    )
    return path


def png(*size):
    return io.BytesIO(archives.encode(archives.pixels(*size), "PNG"))


def cifar10_examples(n):
    return [{"id": f"id_{i}", "image": png(i, 8, 8), "label": i % 3} for i in range(n)]


def imagenet_examples(n):
    return [
        {"file_name": f"{i}.JPEG", "image": png(i, 20 + i, 28), "label": i % 3} for i in range(n)
    ]


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    features = {
        "id": tfds.features.Text(),
        "image": tfds.features.Image(shape=(8, 8, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
    }
    splits = {"train": cifar10_examples(10), "test": cifar10_examples(4)}
    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    return of_tfds(folder, "cifar10", "3.0.2", features, splits)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioned")
    source = archives.cc12m(folder / "in", tars=3, n=8)
    (source / "00000.tar").rename(source / "val-0.tar")
    for number in (1, 2):
        (source / f"0000{number}.tar").rename(source / f"train-{number}.tar")
    prepare("cc12m", source, folder / "out", processes=1)
    return folder / "out"


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("position", ["top", "feature", "sequence", "text"])
def test_a_folder_runs_no_code(cifar10, tmp_path, monkeypatch, key, position):
    """TFDS would import the modules named in features.json, such as one in the same folder."""
    folder, marker = tmp_path / "cifar10", tmp_path / "ran"
    shutil.copytree(cifar10, folder)
    (tmp_path / "payload.py").write_text(f"open({str(marker)!r}, 'w').close()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "payload", raising=False)
    file = folder / "features.json"
    content = json.loads(file.read_text())
    evil = {key: "payload.Feature"} | ({"content": {}} if key == "type" else {"tensor": {}})
    features = content["featuresDict"]["features"]
    if position == "top":
        content = evil
    elif position == "feature":
        features["id"] = evil
    elif position == "sequence":
        name = "tensorflow_datasets.core.features.sequence_feature.Sequence"
        features["id"] = {"pythonClassName": name, "sequence": {"feature": evil, "length": "-1"}}
    else:
        name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
        features["id"] = {"pythonClassName": name, "jsonFeature": {"json": json.dumps({"a": evil})}}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names payload.Feature, which is not in tensorflow"):
        TFDS(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    ["tensorflow_datasets_evil.A", "os.system", "evil.tensorflow_datasets.A", "A", ""]
    + ["tensorflow_datasets.scripts.cli.main.A", "tensorflow_datasets.core.features.a b.A"],
)
def test_names_that_look_like_tfds_are_refused(cifar10, tmp_path, name):
    shutil.copytree(cifar10, tmp_path / "cifar10")
    file = tmp_path / "cifar10" / "features.json"
    text = file.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", name)
    file.write_text(text)
    with pytest.raises(ValueError, match="features.json names"):
        TFDS(tmp_path / "cifar10")


def test_reads_cifar10_of_tfds(cifar10):
    data = TFDS(cifar10)
    assert (len(data), data.classes) == (10, NAMES)
    seen = []
    for i in range(10):
        item = data[i]
        assert item["label"].dtype == np.int32 and item["broken"] == 0
        assert item["caption"] == NAMES[item["label"]] and "size" not in item
        seen.append(next(s for s in range(10) if (item["image"] == archives.pixels(s, 8, 8)).all()))
        assert seen[-1] % 3 == item["label"]
    assert sorted(seen) == list(range(10))
    assert data.vocabulary() == ("dog", "airplane", "big")
    assert data.vocabulary(2) == ("dog", "airplane")
    assert len(TFDS(cifar10, "validation")) == 4  # TFDS's test split
    with pytest.raises(IndexError):
        data[10]


def test_cifar10_conditioning_accepts_cifar10_of_tfds(cifar10):
    values = cifar10_conditioning.get_config()
    values.batch_size = 10
    values.data.update(name="tfds", path=str(cifar10), classes=3, resolution=8)
    config = create_config(values)
    source = create_source(config)
    batch = next(batches(config, source))
    labels = {source[i]["image"].tobytes(): source[i]["label"] for i in range(10)}
    assert len(labels) == 10
    assert [labels[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
    assert create_vocabulary(config, source).classes == NAMES


def test_reads_imagenet2012_of_tfds(tmp_path):
    features = {
        "file_name": tfds.features.Text(),
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(names=NAMES),
    }
    splits = {"train": 5, "validation": 3, "test": 1}
    splits = {split: imagenet_examples(n) for split, n in splits.items()}
    path = of_tfds(tmp_path, "imagenet2012", "5.1.0", features, splits)
    data = TFDS(path, "validation")
    assert len(data) == 3  # not test
    assert sorted(item["image"].shape[0] for item in data) == [20, 21, 22]
    assert all(item["caption"] == NAMES[item["label"]] for item in data)


def test_reads_data_sets_of_mode_prepare(captioned):
    data = TFDS(captioned)
    validation = TFDS(str(captioned), "validation")
    assert (len(data), len(validation)) == (16, 8)
    assert data.classes == ("0",)
    item = data[1]
    np.testing.assert_array_equal(item["image"], decode(archives.jpeg(101)))
    assert item["caption"] == "two green trees, 101" and item["size"] == (200, 280)
    assert list(data.captions())[:2] == ["a blue boat, 100", "two green trees, 101"]
    assert repr(data) == f"TFDS({str(captioned)!r}, split='train')"
    with pytest.raises(ValueError, match="split='test': choose"):
        TFDS(captioned, "test")


def test_vocabulary_is_that_of_the_captions(captioned, tmp_path, monkeypatch):
    data = TFDS(captioned)
    with monkeypatch.context() as patch:
        patch.setattr(TFDS, "_read", None)  # mode prepare has counted the words
        counted = data.vocabulary()
    copy = shutil.copytree(captioned, tmp_path / "copy")
    (copy / "words-train.txt").unlink()
    assert TFDS(copy).vocabulary() == counted
    assert TFDS(copy).vocabulary(3) == counted[:3] == data.vocabulary(3)
    assert counted[0] == "a" and "107" in counted and "7" not in counted


def test_original_size_reaches_the_control_metadata(captioned):
    config = tiny.config(**{"data.name": "tfds", "data.path": str(captioned), "data.flip": False})
    control = next(batches(config, create_source(config), tiny.objective(config).encode_text))[
        "control"
    ]
    assert set(control["height"]) == {200} and set(control["width"]) == {280}
    np.testing.assert_allclose(control["aspect"], 1.4)
    item = TFDS(captioned)[0]
    options = {"resolution": 8, "crop": (0.5, 0.5), "flip": False}
    plain, scalars = augment(item["image"], np.random.default_rng(0), **options)
    resized, original = augment(
        item["image"], np.random.default_rng(0), original=(1000, 500), **options
    )
    np.testing.assert_array_equal(plain, resized)
    assert (original["height"], original["width"], original["aspect"]) == (1000, 500, 0.5)
    assert all(original[name] == scalars[name] for name in scalars if name.startswith("crop"))
    assert set(original) == set(scalars) and original["height"].dtype == np.float32


def test_pickling_changes_nothing(captioned):
    data = TFDS(captioned)
    np.testing.assert_array_equal(data[3]["image"], decode(archives.jpeg(103)))
    clone = pickle.loads(pickle.dumps(data))
    np.testing.assert_array_equal(clone[3]["image"], data[3]["image"])
    assert len(clone) == 16


def test_open_files_are_bounded_and_closed(captioned, tmp_path):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    copy = shutil.copytree(captioned, tmp_path / "copy")

    def count():
        links = []
        for descriptor in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                links.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return sum(str(copy) in link for link in links)

    data = TFDS(copy)
    assert count() == 0
    list(data)
    assert count() == len(list(copy.glob("cc12m-train*"))) == 1
    assert data._records._open.cache_info().maxsize <= 256
    del data
    assert count() == 0


def test_damaged_records_are_skipped_counted_and_logged_once(captioned, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    copy = shutil.copytree(captioned, tmp_path / "copy")
    (shard,) = copy.glob("cc12m-train*")
    contents = bytearray(shard.read_bytes())
    image = archives.jpeg(101)
    contents[contents.index(image) + 300] ^= 0xFF  # its checksum no longer matches
    shard.write_bytes(contents)
    data = TFDS(copy)
    items = [data[i] for i in (0, 1, 2, 1)]
    assert [int(item["broken"]) for item in items] == [0, 1, 0, 1]
    np.testing.assert_array_equal(items[1]["image"], items[2]["image"])
    assert len(lines) == 1 and f"record 1 of {copy} (train)" in lines[0]


def test_bad_folders_are_one_line_errors(captioned, cifar10, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; mode prepare makes it"):
        TFDS(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no TFDS data set .no dataset_info.json.$"):
        TFDS(tmp_path)
    with pytest.raises(ValueError, match="give .*cifar10/3.0.2"):
        TFDS(cifar10.parent)
    copy = shutil.copytree(captioned, tmp_path / "copy")
    (shard,) = copy.glob("cc12m-train*")
    shard.rename(copy / "gone")
    with pytest.raises(FileNotFoundError, match="cc12m-train.* is missing"):
        TFDS(copy)
    assert len(TFDS(copy, "validation")) == 8
    info = json.loads((copy / "dataset_info.json").read_text())
    info["splits"] = info["splits"][:1]
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="has no split validation, only train"):
        TFDS(copy, "validation")
    info["fileFormat"] = "tfrecord"
    (copy / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="format tfrecord; .*tfds convert_format .*copy") as error:
        TFDS(copy)
    assert "\n" not in str(error.value)
    (copy / "dataset_info.json").write_text("{")
    with pytest.raises(ValueError, match="metadata cannot be read"):
        TFDS(copy)


def test_the_feature_image_is_required(tmp_path):
    texts = [{"text": "a"}, {"text": "b"}]
    features = {"text": tfds.features.Text()}
    path = of_tfds(tmp_path, "letters", "1.0.0", features, {"train": texts})
    with pytest.raises(ValueError, match="has no feature image, only text"):
        TFDS(path)


def test_shards_can_be_shared_by_threads(captioned):
    from concurrent.futures import ThreadPoolExecutor

    data = TFDS(captioned)
    with ThreadPoolExecutor(8) as pool:
        captions = list(pool.map(lambda i: data[i % 16]["caption"], range(200)))
    assert captions == [data[i % 16]["caption"] for i in range(200)]
    assert data._records.find(15)[1] == 15 and len(data._records) == 16
