"""Tests that each builder converts its official archives to a TFDS data set."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds

from condiff_jax.data.builders.prepare import prepare, report
from condiff_jax.data.builders.units import SourceError
from tests.data.builders import archives

PARENT = ("..", "..")


def build(builder, source, out, **options):
    """Prepare; returns the manifest, TFDS's builder and {split: {key: record as read by TFDS}}."""
    manifest = prepare(builder, source, out, **{"processes": 1, **options})
    loaded = tfds.builder_from_directory(out)
    records = {}
    for split in loaded.info.splits:
        raw = loaded.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        records[split] = {record["key"].decode(): record for record in raw}
        assert len(records[split]) == len(raw) == manifest["images"][split]
    return manifest, loaded, records


def skipped(manifest):
    return {reason: row["examples"] for reason, row in manifest["skipped"].items()}


def test_imagenet1k(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=2, validation=12)
    manifest, loaded, records = build("imagenet1k", source, tmp_path / "out")
    names = sorted(archives.WNIDS)
    assert loaded.info.features["label"].names == names
    assert manifest["images"] == {"train": 20, "validation": 12}
    for wnid in archives.WNIDS:
        for i in range(2):
            record = records["train"][f"{wnid}_{i}"]
            assert record["image"] == archives.jpeg(int(wnid[1:]) * 10 + i)  # unchanged
            assert record["label"] == names.index(wnid)
            assert record["caption"].decode() == f"thing {wnid[-2:]}, a thing"
            assert (record["height"], record["width"]) == (20, 28)
    for i in range(12):  # the devkit's class ids are in another order than labels
        record = records["validation"][f"ILSVRC2012_val_{i + 1:08d}"]
        assert record["image"] == archives.jpeg(900 + i)
        assert names[record["label"]] == archives.WNIDS[i % 10]
    assert manifest["images_of_a_class"]["train"]["least"] == 2
    sizes = [(tmp_path / "out" / f).stat().st_size for f in loaded.info.splits["train"].filenames]
    assert loaded.info.splits["train"].num_bytes == sum(sizes)
    assert manifest["images_of_a_class"]["validation"]["most"] == 2
    assert not manifest["skipped"]
    inner = next(s for s in manifest["sources"] if s["name"].endswith("n00000003.tar"))
    data = archives.class_tar("n00000003", 2)
    assert inner["size"] == len(data)
    assert inner["sha256"] == hashlib.sha256(data).hexdigest()
    assert [f.name for f in sorted((tmp_path / "out").iterdir())] == [
        "dataset_info.json", "features.json",
        "imagenet1k-train.array_record-00000-of-00001",
        "imagenet1k-validation.array_record-00000-of-00001",
        "label.labels.txt", "manifest.json", "words-train.txt", "words-validation.txt",
    ]  # fmt: skip
    image = loaded.as_data_source(split="train")[0]["image"]  # decoded by TFDS
    assert image.shape == (20, 28, 3) and image.dtype == np.uint8


@pytest.mark.parametrize(
    "name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]
)
def test_imagenet1k_requires_its_three_files(tmp_path, name):
    source = archives.imagenet1k(tmp_path / "in", n=1)
    (source / name).rename(source / "renamed.bin")
    with pytest.raises(SourceError, match=f"has no {name}, only .*renamed.bin"):
        prepare("imagenet1k", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "cannot be read"),
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: archives.tar([("x/readme.txt", b"x")], mode="w:gz"), "no data/meta.mat"),
        (lambda data: archives.devkit(truth=(1, 77)), "unknown class 77"),
    ],
)
def test_imagenet1k_requires_an_intact_devkit(tmp_path, damage, message):
    source = archives.imagenet1k(tmp_path / "in", n=1)
    devkit = source / "ILSVRC2012_devkit_t12.tar.gz"
    devkit.write_bytes(damage(devkit.read_bytes()))
    with pytest.raises(SourceError, match=message):
        prepare("imagenet1k", source, tmp_path / "out")


def test_imagenet1k_counts_skipped_members(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=1, validation=2)
    known, inner = archives.WNIDS[0], archives.jpeg(1)
    members = [(f"{known}_1.JPEG", inner), ("../../up.JPEG", inner), ("notes.txt", b"x")]
    duplicate = [(f"{known}_1.JPEG", archives.jpeg(2))]
    outer = [
        (f"{known}.tar", archives.tar(members + duplicate)),
        ("n77777777.tar", archives.class_tar("n77777777")),
        ("stray.txt", b"x"),
        ("../n00000001.tar", archives.class_tar("n00000001")),
        (f"again/{known}.tar", archives.class_tar(known)),
    ]
    (source / "ILSVRC2012_img_train.tar").write_bytes(archives.tar(outer))
    names = ("00000001", "00000003", "00000000", "1")
    validation = [(f"ILSVRC2012_val_{name}.JPEG", inner) for name in names]
    validation += [(f"{folder}ILSVRC2012_val_00000001.JPEG", inner) for folder in ("val/", "")]
    (source / "ILSVRC2012_img_val.tar").write_bytes(archives.tar(validation))
    manifest, _, records = build("imagenet1k", source, tmp_path / "out")
    assert skipped(manifest) == {
        "duplicate key": [f"again/{known}.tar", *2 * ["ILSVRC2012_val_00000001"], f"{known}_1"],
        "no image name": ["notes.txt"],
        "unknown class": ["ILSVRC2012_img_train.tar/n77777777.tar"],
        "unsafe path": ["../n00000001.tar", "../../up.JPEG"],
        "wrong file name": ["stray.txt", *(f"ILSVRC2012_val_{n}.JPEG" for n in names[1:])],
    }
    assert records["train"][f"{known}_1"]["image"] == inner  # the first of two
    assert manifest["images"] == {"train": 1, "validation": 1}
    class_sizes = manifest["images_of_a_class"]["train"]
    assert class_sizes["empty"]["count"] == 9
    assert (class_sizes["median"], class_sizes["most"]) == (0, 1)


def test_truncated_outer_tar_keeps_readable_images(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=4)
    train = source / "ILSVRC2012_img_train.tar"
    whole = train.read_bytes()
    size = len(archives.class_tar(archives.WNIDS[0], 4))
    cut = (
        512 + size + 512 + 512 + len(archives.jpeg(30)) + 600
    )  # inside the second image of the second tar
    train.write_bytes(whole[:cut])
    manifest, _, records = build("imagenet1k", source, tmp_path / "out")
    first, second = archives.WNIDS[:2]
    assert set(records["train"]) == {*(f"{first}_{i}" for i in range(4)), f"{second}_0"}
    assert skipped(manifest) == {
        "truncated tar": ["ILSVRC2012_img_train.tar", f"ILSVRC2012_img_train.tar/{second}.tar"]
    }
    assert manifest["images_of_a_class"]["train"]["empty"]["count"] == 8


def test_truncated_validation_keeps_readable_images(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=1, validation=3)
    validation = source / "ILSVRC2012_img_val.tar"
    whole = validation.read_bytes()
    validation.write_bytes(whole[: whole.index(archives.jpeg(902)) + 300])
    manifest, _, records = build("imagenet1k", source, tmp_path / "out")
    assert len(records["validation"]) == 2
    assert skipped(manifest) == {"truncated tar": ["ILSVRC2012_img_val.tar"]}
    validation.write_bytes(b"")
    with pytest.raises(SourceError, match="img_val.tar has no ILSVRC2012_val_########.JPEG"):
        prepare("imagenet1k", source, tmp_path / "new")
    outer = archives.tar([("n77777777.tar", archives.class_tar("n77777777"))])
    (source / "ILSVRC2012_img_train.tar").write_bytes(outer)
    with pytest.raises(SourceError, match="img_train.tar has no tars of the classes in ILSVRC"):
        prepare("imagenet1k", source, tmp_path / "new")


def test_truncated_inner_tar_stays_within_its_bounds(tmp_path):
    source = archives.imagenet1k(tmp_path / "in", n=1)
    first, second = archives.WNIDS[:2]
    half = archives.class_tar(first)[: 512 + 300]
    outer = [(f"{first}.tar", half), (f"{second}.tar", archives.class_tar(second))]
    (source / "ILSVRC2012_img_train.tar").write_bytes(archives.tar(outer))
    manifest, _, records = build("imagenet1k", source, tmp_path / "out")
    assert set(records["train"]) == {f"{second}_{i}" for i in range(3)}
    assert skipped(manifest) == {"truncated tar": [f"ILSVRC2012_img_train.tar/{first}.tar"]}


@pytest.mark.parametrize("nested", [False, True])
def test_imagenet22k(tmp_path, nested):
    source = archives.imagenet22k(tmp_path / "in", classes=5)
    if nested:
        members = [(f"winter21/{p.name}", p.read_bytes()) for p in sorted(source.iterdir())]
        shutil.rmtree(source)
        source = tmp_path / "whole.tar"
        source.write_bytes(archives.tar(members))
    manifest, loaded, records = build("imagenet22k", source, tmp_path / "out")
    assert loaded.info.features["label"].names == [f"n{i:08d}" for i in range(5)]
    assert {key: r["label"] for key, r in records["train"].items()} == {
        f"n{c:08d}_{i}": c for c in range(5) for i in range(2)
    }
    assert manifest["images"] == {"train": 10} and manifest["classes"] == 5
    assert not manifest["skipped"]


def test_imagenet22k_skips_validation_folders(tmp_path):
    source = archives.imagenet22k(tmp_path / "in", classes=2, n=1)
    (source / "val").mkdir()
    shutil.copy(source / "n00000001.tar", source / "val" / "n00000001.tar")
    (source / "n00000001.tar").rename(source / "n00000009.tar")
    manifest, loaded, _ = build("imagenet22k", source, tmp_path / "out")
    assert skipped(manifest) == {"validation split": ["val/n00000001.tar"]}
    assert loaded.info.features["label"].names == ["n00000000", "n00000009"]


def test_imagenet22k_counts_duplicate_classes(tmp_path):
    source = archives.imagenet22k(tmp_path / "in", classes=2, n=1)
    inner = [(path.name, path.read_bytes()) for path in sorted(source.iterdir())]
    (source / "a.tar").write_bytes(archives.tar(inner[:1]))
    (source / "more").mkdir()
    (source / "more" / "n00000001.tar").write_bytes(archives.class_tar("n00000001", 3))
    (source / "n00000002.tar").symlink_to("/no/such")
    manifest, _, _ = build("imagenet22k", source, tmp_path / "out")
    assert skipped(manifest) == {
        "duplicate key": ["n00000000.tar", "n00000001.tar"],
        "missing file": ["n00000002.tar"],
    }
    assert (
        manifest["images"] == {"train": 4} and manifest["classes"] == 2
    )  # the first tar of each class


def test_cc12m(tmp_path):
    source = archives.cc12m(tmp_path / "in", tars=2, n=3)
    manifest, _, records = build("cc12m", source, tmp_path / "out")
    assert manifest["images"] == {"train": 6}
    record = records["train"]["000000101"]
    assert record["caption"].decode() == "two green trees, 101"
    assert record["image"] == archives.jpeg(101)
    assert (record["height"], record["width"]) == (200, 280)  # before img2dataset's resizing
    assert record["label"] == 0
    words = (tmp_path / "out" / "words-train.txt").read_text().split()
    assert words[0] in ("a", "two") and set(words) >= {"red", "trees", "101"}
    data = (source / "00000.tar").read_bytes()
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(data).hexdigest()


def test_cc12m_splits_by_name(tmp_path):
    source = archives.cc12m(tmp_path / "in", tars=2, n=2)
    (source / "00000.tar").rename(source / "train-0.tar")
    (source / "00001.tar").rename(source / "val-0.tar")
    (source / "other.tar").write_bytes(b"")
    manifest, _, records = build("cc12m", source, tmp_path / "out")
    assert set(records["validation"]) == {"000000100", "000000101"}
    assert skipped(manifest) == {"wrong file name": ["other.tar"]}


def test_splits_in_the_middle_of_names(tmp_path):
    source = archives.cc12m(tmp_path / "in", tars=2, n=2)
    # Names as in pixparse/cc3m-wds on Hugging Face.
    (source / "00000.tar").rename(source / "cc3m-train-0000.tar")
    (source / "00001.tar").rename(source / "cc3m-validation-0000.tar")
    manifest, _, _ = build("cc12m", source, tmp_path / "out")
    assert manifest["images"] == {"train": 2, "validation": 2}


def test_keys_in_several_tars_are_kept_and_counted(tmp_path, capsys):
    source = archives.cc12m(tmp_path / "in", tars=2, n=3)
    shutil.copy(
        source / "00000.tar", source / "00002.tar"
    )  # or a second download with new numbering
    manifest = prepare("cc12m", source, tmp_path / "out", processes=1)
    assert manifest["images"] == {"train": 9} and manifest["repeated_keys"] == 3
    report(manifest, "cc12m", tmp_path / "out")
    assert "Kept 3 images whose key another archive has, too" in capsys.readouterr().out


def test_links_are_followed_and_missing_files_are_counted(tmp_path):
    source = archives.cc12m(tmp_path / "in", tars=2, n=1)
    (tmp_path / "far").mkdir()
    (source / "00001.tar").rename(tmp_path / "far" / "00001.tar")
    (source / "far").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "back").symlink_to(source)  # a cycle
    (source / "gone.tar").symlink_to("/no/such")
    (source / "folder.tar").mkdir()
    manifest, _, records = build("cc12m", source, tmp_path / "out")
    assert set(records["train"]) == {"000000000", "000000100"}
    assert skipped(manifest) == {"missing file": ["gone.tar"]}
    images = archives.classes(tmp_path / "images", splits=("train",), n=1)
    (images / "train" / "dog").rename(tmp_path / "dog")
    (images / "train" / "dog").symlink_to(tmp_path / "dog")
    _, loaded, _ = build("folder", images, tmp_path / "out_images")
    assert loaded.info.features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize("zipped", [False, True])
def test_coco(tmp_path, zipped):
    source = archives.coco(tmp_path / "in", n=12, zipped=zipped)
    manifest, _, records = build("coco", source, tmp_path / "out")
    assert manifest["images"] == {"validation": 12}
    choices = []
    for i in range(12):
        record = records["validation"][f"COCO_val2014_{i:012d}"]
        assert record["image"] == archives.jpeg(i)
        assert record["caption"].decode().startswith(f"picture {i} text ")
        choices.append(record["caption"].decode()[-1])
    assert len(set(choices)) > 2  # random, not the first
    assert choices == list("424223231110")  # must never change, as scores depend on it
    if zipped:
        return
    path = source / "annotations" / "captions_val2014.json"
    path.write_text(json.dumps({k: v[::-1] for k, v in json.loads(path.read_text()).items()}))
    _, _, reordered = build("coco", source, tmp_path / "reordered")
    assert list(reordered["validation"].items()) == list(records["validation"].items())


def test_a_broken_zip_is_one_error(tmp_path):
    source = archives.coco(tmp_path / "in", zipped=True)
    path = source / "val2014.zip"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SourceError, match="val2014.zip is truncated or not a zip file .*download"):
        prepare("coco", source, tmp_path / "out")


def test_coco_of_both_splits(tmp_path):
    source = archives.coco(tmp_path / "in", n=2, splits=("train2014", "val2014"))
    (source / "train2014" / "COCO_train2014_000000000001.jpg").unlink()
    shutil.make_archive(source / "train2014", "zip", source, "train2014")
    shutil.rmtree(source / "train2014")
    manifest, _, records = build("coco", source, tmp_path / "out")
    assert manifest["images"] == {"train": 1, "validation": 2}
    assert set(records["train"]) == {"COCO_train2014_000000000000"}
    assert skipped(manifest) == {"missing file": ["COCO_train2014_000000000001.jpg"]}
    for path in (source / "val2014").iterdir():  # names that the captions do not list
        path.rename(path.with_name(path.name.replace("2014", "2017")))
    with pytest.raises(SourceError, match="val2014 has none of the images of captions_val2"):
        prepare("coco", source, tmp_path / "new")


def test_coco_counts_skipped_images(tmp_path):
    source = archives.coco(tmp_path / "in", n=5)
    path = source / "annotations" / "captions_val2014.json"
    data = json.loads(path.read_text())
    data["images"][1]["file_name"] = "../../etc/hosts"
    data["images"][2]["file_name"] = data["images"][0]["file_name"]
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] != 3]
    path.write_text(json.dumps(data))
    manifest, _, records = build("coco", source, tmp_path / "out")
    assert skipped(manifest) == {
        "duplicate key": ["COCO_val2014_000000000000"],
        "missing file": ["../../etc/hosts"],
        "no caption": ["COCO_val2014_000000000003"],
    }
    path.write_text("{}")
    with pytest.raises(SourceError, match="captions_val2014.json is not captions_val2014.json"):
        prepare("coco", source, tmp_path / "other")
    path.unlink()
    with pytest.raises(SourceError, match="has no annotations/captions_val2014.json or"):
        prepare("coco", source, tmp_path / "other")


def test_folder_of_classes(tmp_path):
    source = archives.classes(tmp_path / "in")
    (source / "train" / "cat" / "notes.txt").write_text("x")
    (source / "train" / "stray.jpg").write_bytes(archives.jpeg(0))
    (source / "val" / "ant").mkdir()
    (source / "val" / "ant" / "deep").mkdir()
    (source / "val" / "ant" / "deep" / "0.PNG").write_bytes(
        archives.encode(archives.pixels(5), "PNG")
    )
    manifest, loaded, records = build("folder", source, tmp_path / "out")
    assert loaded.info.features["label"].names == ["ant", "cat", "dog"]
    labels = {key: record["label"] for key, record in records["train"].items()}
    assert labels == {
        f"train/{c}/{i}.jpg": n for n, c in ((1, "cat"), (2, "dog")) for i in range(3)
    }
    assert records["validation"]["val/ant/deep/0.PNG"]["label"] == 0
    assert skipped(manifest) == {
        "no image name": ["cat/notes.txt"],
        "outside of class folders": ["stray.jpg"],
    }


LINES = [
    {"file_name": "a.jpg", "caption": "  a café, no table ", "label": "x"},
    {"file_name": "sub/b.jpg", "caption": "", "split": "val", "label": 7},
    {"file_name": "a.jpg", "caption": "again"},
    {"file_name": "gone.jpg", "caption": "gone"},
    {"file_name": "../up.jpg", "caption": "up"},
    {"file_name": "c.jpg", "caption": "c", "split": "extra"},
    {"caption": "nothing"},
    {"file_name": "/etc/hosts", "caption": "root's"},
]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_folder_with_captions(tmp_path, form):
    source = tmp_path / "in"
    (source / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "c.jpg"):
        (source / name).write_bytes(archives.jpeg(len(name)))
    if form == "csv":
        columns = ("file_name", "caption", "split", "label")
        text = ",".join(columns) + "\n"
        for line in LINES:
            text += ",".join('"{}"'.format(line.get(c, "")) for c in columns) + "\n"
        (source / "captions.csv").write_text(text)
    else:
        text = "\n".join(json.dumps(line) for line in LINES)
        (source / "captions.jsonl").write_text(text + "\n\n[3]\n{broken\n")
    manifest, loaded, records = build("folder", source, tmp_path / "out")
    train, validation = records["train"]["a.jpg"], records["validation"]["sub/b.jpg"]
    assert train["caption"].decode() == "a café, no table" and validation["caption"] == b""
    assert loaded.info.features["label"].names == ["7", "x"]
    assert (train["label"], validation["label"]) == (1, 0)
    bad = ["captions.csv:7"] if form == "csv" else [f"captions.jsonl:{n}" for n in (7, 9, 10)]
    assert skipped(manifest) == {
        "bad line": bad,
        "duplicate key": ["a.jpg"],
        "missing file": ["gone.jpg"],
        "unknown split": ["c.jpg"],
        "unsafe path": ["../up.jpg", "/etc/hosts"],
    }


def test_a_list_at_the_top_may_list_split_folders(tmp_path):
    source = archives.classes(tmp_path / "in", names=("cat",), n=1)
    lines = "file_name,caption,split\nval/cat/0.jpg,a cat,\ntrain/cat/0.jpg,one,val\n"
    (source / "captions.csv").write_text(lines)
    _, _, records = build("folder", source, tmp_path / "out")
    assert set(records) == {"validation"} and len(records["validation"]) == 2
    shutil.move(source / "captions.csv", source / "val" / "captions.csv")
    (source / "val" / "captions.csv").write_text("file_name,caption,label\ncat/0.jpg,a cat,cat\n")
    _, _, records = build("folder", source, tmp_path / "new")
    assert records["validation"]["val/cat/0.jpg"]["caption"] == b"a cat"
    assert records["train"]["train/cat/0.jpg"]["caption"] == b""


@pytest.mark.parametrize(
    "names",
    [("train", "valid", "test"), ("Training", "Dev", "Testing"), ("train2017", "val2017", "t")],
)
def test_folders_of_splits_by_their_usual_names(tmp_path, names):
    source = archives.classes(tmp_path / "in", n=1, splits=names)
    manifest, _, records = build("folder", source, tmp_path / "out")
    for split, name in zip(("train", "validation"), names, strict=False):
        assert set(records[split]) == {f"{name}/cat/0.jpg", f"{name}/dog/0.jpg"}
    assert manifest["classes"] == 2
    left_out = {"test split": [f"{names[2]}/{c}/0.jpg" for c in ("cat", "dog")]}
    assert skipped(manifest) == ({} if names[2] == "t" else left_out)


def test_splits_inside_class_folders(tmp_path):
    for name in ("cat/train/0.jpg", "cat/val/1.jpg", "dog/train/2.jpg", "dog/test/3.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        (tmp_path / "in" / name).write_bytes(archives.jpeg(0))
    manifest, _, records = build("folder", tmp_path / "in", tmp_path / "out")
    assert set(records["train"]) == {"cat/train/0.jpg", "dog/train/2.jpg"}
    assert set(records["validation"]) == {"cat/val/1.jpg"}
    assert skipped(manifest) == {"test split": ["dog/test/3.jpg"]}


CSV, JSONL = "captions.csv", "captions.jsonl"


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        (CSV, b'\xef\xbb\xbffile_name,caption\r\n0.jpg,"a ""q"", b"\r\n', {"0": 'a "q", b'}),
        (CSV, b'file_name, caption\n0.jpg, "a, b"\n1.jpg,\n', {"0": "a, b", "1": ""}),
        (CSV, b"file_name,caption\n0.jpg,caf\xe9\n1.jpg\n", {"0": "caf\ufffd", "1": ""}),
        (CSV, b"file_name,label\n0.jpg,x\n1.jpg,\n", {"0": "", "no label": "1.jpg"}),
        (CSV, b'file_name,caption\n0.jpg,"a\n1.jpg,b\n', ", line 3: unexpected end of data"),
        (
            CSV,
            b"file_name,text\n0.jpg,a\n",
            "has neither captions nor labels; it needs the columns",
        ),
        (CSV, b"file_name;caption\n0.jpg;a\n", "no column file_name but 'file_name;caption'; it"),
        (CSV, b"file,text\n0.jpg,b\n", "no column file_name but 'file', 'text'; it needs"),
        (CSV, b"", "no column file_name but none; it needs"),
        (CSV, b"file_name,caption\n", "in has no images"),
        (JSONL, b'{"file_name": "0.jpg", "caption": 5}\r\n', {"0": "5"}),
        (JSONL, b'{"file_name": "0.jpg", "text": "a"}\n', "has neither captions nor labels"),
        (
            JSONL,
            b'{"file_name": "0.jpg", "caption": ["a"]}\n{"file_name": "1.jpg", "caption": "b"}\n',
            {"1": "b", "bad line": "captions.jsonl:1"},
        ),
        (
            JSONL,
            b'{"file_name": "0.jpg", "caption": "b"}\n{"file_name": "%s.jpg"}' % (b"x" * 300),
            {"0": "b", "missing file": f"{'x' * 300}.jpg"},
        ),
        (
            JSONL,
            b'{"file_name": "0.jpg", "caption": "b"}\n{"file_name": "1.jpg", "split": ["val"]}',
            {"0": "b", "bad line": "captions.jsonl:2"},
        ),
    ],
)
def test_lists_as_people_write_them(tmp_path, name, data, expected):
    """Expect an error, or captions by key and the first skipped name by reason."""
    source = tmp_path / "in"
    source.mkdir()
    for number in range(2):
        (source / f"{number}.jpg").write_bytes(archives.jpeg(number))
    (source / name).write_bytes(data)
    if isinstance(expected, str):
        with pytest.raises(SourceError, match=expected) as error:
            prepare("folder", source, tmp_path / "out", processes=1)
        assert "\n" not in str(error.value)
        return
    manifest, _, records = build("folder", source, tmp_path / "out")
    captions = {
        key.removesuffix(".jpg"): record["caption"].decode()
        for key, record in records["train"].items()
    }
    assert captions | {reason: keys[0] for reason, keys in skipped(manifest).items()} == expected


@pytest.mark.parametrize("builder", ["imagenet1k", "imagenet22k", "cc12m", "coco", "folder"])
def test_empty_sources_are_one_line_errors(tmp_path, builder):
    (tmp_path / "in").mkdir()
    with pytest.raises(SourceError, match=r"in has no") as error:
        prepare(builder, tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(error.value)
    with pytest.raises(SourceError, match="nowhere does not exist"):
        prepare(builder, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="file (is not a folder|has no)|1 truncated tar"):
        prepare(builder, tmp_path / "file", tmp_path / "out", processes=1)
