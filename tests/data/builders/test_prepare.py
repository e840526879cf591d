"""Tests of mode prepare with damaged images, interruptions and changed sources."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from condiff_jax.data.builders import prepare as driver
from condiff_jax.data.builders import shards
from condiff_jax.data.builders.prepare import prepare, report
from condiff_jax.data.builders.units import BoxesError, OutputError, SourceError
from condiff_jax.data.images import decode
from condiff_jax.data.tfds_source import TFDS
from tests.data.builders import archives
from tests.data.builders.archives import captioned, encode, jpeg, pixels

ROOT = Path(__file__).parents[3]


def raw(folder):
    """Training records as read by TFDS, with encoded images."""
    decoders = {"image": tfds.decode.SkipDecoding()}
    return tfds.builder_from_directory(folder).as_data_source(split="train", decoders=decoders)


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def odd_images():
    """Valid images of unusual kinds: {name: (file, upright (height, width))}."""
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb = Image.fromarray(pixels(1))
    gray16 = (np.arange(20 * 28, dtype=np.uint16) * 100).reshape(20, 28)
    noise = np.random.default_rng(0).integers(0, 256, (20, 28, 4), np.uint8)
    return {
        "cmyk": (encode(rgb.convert("CMYK")), (20, 28)),
        "gray": (encode(rgb.convert("L")), (20, 28)),
        "gray16": (encode(Image.fromarray(gray16), "PNG"), (20, 28)),
        "alpha": (encode(Image.fromarray(noise), "PNG"), (20, 28)),
        "palette": (encode(rgb.convert("P"), "PNG"), (20, 28)),
        "webp": (encode(rgb, "WEBP"), (20, 28)),
        "rotated": (encode(rgb, exif=exif.tobytes()), (28, 20)),
        "pixel": (encode(pixels(1, 1, 1), "PNG"), (1, 1)),
        "row": (encode(pixels(1, 1, 30), "PNG"), (1, 30)),
    }


def bad_images():
    """Bad images: {name: (file, reason for skipping it)}."""
    whole = jpeg(3, 200, 200)
    png = bytearray(encode(pixels(4, 60, 60), "PNG"))
    png[len(png) // 2] ^= 0xFF
    return {
        "cut": (whole[: len(whole) // 2], "damaged image"),
        "flipped": (bytes(png), "damaged image"),
        "empty": (b"", "not a JPEG, PNG or WebP image"),
        "html": (b"<html>404</html>", "not a JPEG, PNG or WebP image"),
        "gif": (encode(pixels(5), "GIF"), "not a JPEG, PNG or WebP image"),
        "bomb": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "too large"),
        "big": (encode(Image.new("1", (9_500, 9_500)), "PNG"), "too large"),
    }


def test_odd_images_are_kept_and_bad_ones_counted(tmp_path):
    good, bad = odd_images(), bad_images()
    members = [(f"{name}.jpg", data) for name, (data, _) in {**good, **bad}.items()]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(archives.tar(members))
    manifest = prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)
    reasons = {
        name: reason for reason, row in manifest["skipped"].items() for name in row["examples"]
    }
    assert reasons == {name: reason for name, (_, reason) in bad.items()}
    assert manifest["images"] == {"train": len(good)}
    data = TFDS(tmp_path / "out")
    for i, (image, size) in enumerate(good.values()):
        record = raw(tmp_path / "out")[i]
        assert record["image"] == image and (record["height"], record["width"]) == size
        np.testing.assert_array_equal(data[i]["image"], decode(image))
        assert data[i]["broken"] == 0 and "size" not in data[i]


def test_captions_and_keys_of_all_kinds(tmp_path):
    long = "long caption " * 800
    members = [
        ("empty.jpg", jpeg(0)), ("empty.txt", b" \n"),
        ("none.jpg", jpeg(1)),
        ("long.jpg", jpeg(2)), ("long.txt", long.encode()),
        ("bytes.jpg", jpeg(3)), ("bytes.txt", b"caf\xe9 \xff"),
        ("lone.jpg", jpeg(4)), ("lone.json", rb'{"caption": "a \ud800 b"}'),
        ("true.jpg", jpeg(11)), ("true.json", b'{"original_width": true, "original_height": 9}'),
        ("twice.jpg", jpeg(5)), ("twice.jpg", jpeg(6)),
        ("bare.txt", b"no picture"),
        ("../../up.jpg", jpeg(7)), ("/root/abs.jpg", jpeg(8)), ("a/../b.jpg", jpeg(9)),
        ("k\udce9y.jpg", jpeg(10)),
        ("wide.jpg", jpeg(11)), ("wide.json", b'{"original_width": 0, "original_height": 5}'),
        ("text.jpg", jpeg(11)), ("text.json", b'{"original_width": "9", "original_height": 9}'),
        ("vast.jpg", jpeg(11)), ("vast.json", b'{"original_width": 9, "original_height": 1e99}'),
        ("cut.jpg", jpeg(12)), ("cut.json", b'{"caption": "x"'),
    ]  # fmt: skip
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(archives.tar(members))
    manifest = prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)
    assert {r: row["examples"] for r, row in manifest["skipped"].items()} == {
        "duplicate key": ["twice"],
        "no image": ["bare"],
        "unsafe path": ["../../up", "a/../b"],
    }
    data = TFDS(tmp_path / "out")
    keys = [record["key"].decode() for record in raw(tmp_path / "out")]
    sizes = {(record["height"], record["width"]) for record in raw(tmp_path / "out")}
    assert sizes == {(20, 28)}  # of the images, as the sizes in JSON are invalid
    records = dict(zip(keys, data, strict=True))
    captions = {key: record["caption"] for key, record in records.items()}
    assert captions == {
        "empty": "", "none": "", "long": long.strip(), "bytes": "caf\ufffd \ufffd", "lone": "a ? b",
        "twice": "", "root/abs": "", "k?y": "", "wide": "", "text": "", "vast": "", "true": "",
        "cut": "",
    }  # fmt: skip
    np.testing.assert_array_equal(records["twice"]["image"], decode(jpeg(5)))
    assert all(record["image"].shape == (20, 28, 3) for record in records.values())
    assert not any("size" in record for record in records.values())


def test_original_sizes_are_rotated_with_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    rotated = encode(Image.fromarray(pixels(1)), exif=exif.tobytes())
    members = captioned(1, "a", (300, 420)) + captioned(2, "b", (300, 420), rotated)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(archives.tar(members))
    prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)
    first, second = TFDS(tmp_path / "out")
    assert (first["image"].shape, first["size"]) == ((20, 28, 3), (300, 420))
    assert (second["image"].shape, second["size"]) == ((28, 20, 3), (420, 300))


def test_a_source_without_usable_images_is_an_error(tmp_path):
    (tmp_path / "in").mkdir()
    members = [("a.jpg", b"x"), ("b.jpg", b"y"), ("c.txt", b"z")]
    (tmp_path / "in" / "0.tar").write_bytes(archives.tar(members))
    for _ in range(2):
        with pytest.raises(SourceError, match=r"no usable image .*1 no image, 2 not a JPEG"):
            prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)
    (tmp_path / "in" / "0.tar").write_bytes(b"")
    with pytest.raises(SourceError, match="no usable image .1 truncated tar"):
        prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)


def test_truncated_tars_warn_and_keep_the_rest(tmp_path, capsys):
    source = archives.cc12m(tmp_path / "in", tars=2, n=6)
    whole = (source / "00000.tar").read_bytes()
    (source / "00000.tar").write_bytes(whole[: len(whole) // 2])
    (source / "00002.tar").write_bytes(archives.tar([("a.jpg", jpeg(0))], mode="w:gz"))
    manifest = prepare("cc12m", source, tmp_path / "out", processes=1)
    assert manifest["skipped"]["truncated tar"]["examples"] == ["00000.tar", "00002.tar"]
    assert 6 < manifest["images"]["train"] < 12
    report(manifest, "cc12m", tmp_path / "out")
    out, err = capsys.readouterr()
    assert "Skipped 2 (truncated tar): 00000.tar, 00002.tar" in err
    assert f"{manifest['images']['train']} for train" in out and "Blurred" not in out


def test_listed_names_of_skipped_samples_are_bounded(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        members = [(f"{number}{i:03d}.txt", b"x") for i in range(50)] + [(f"{number}.jpg", jpeg(1))]
        (tmp_path / "in" / f"{number}.tar").write_bytes(archives.tar(members))
    manifest = prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1)
    row = manifest["skipped"]["no image"]
    assert row["count"] == 150 and len(row["examples"]) == shards.EXAMPLES


def test_faces_are_blurred_and_the_rest_is_unchanged(tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    data = encode(noise, quality=98)
    (tmp_path / "in").mkdir()
    members = [("face.jpg", data), ("none.jpg", data)]
    (tmp_path / "in" / "0.tar").write_bytes(archives.tar(members))
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({"face": [[10, 20, 50, 60.5], [-9, -9, -2, -2]], "other": []}))
    manifest = prepare("cc12m", tmp_path / "in", tmp_path / "out", processes=1, boxes=str(boxes))
    report(manifest, "cc12m", tmp_path / "out")
    assert "Blurred 1 images" in capsys.readouterr().out and manifest["blurred"] == 1
    records = TFDS(tmp_path / "out")
    assert raw(tmp_path / "out")[1]["image"] == data
    face, plain = records[0]["image"].astype(float), records[1]["image"].astype(float)
    assert face[24:56, 14:46].std() < 0.15 * plain[24:56, 14:46].std()
    assert (
        face[60, 14:46].std() < 0.3 * plain[60, 14:46].std()
    )  # the last row, which is only partly in the box
    inside = np.zeros((80, 100), bool)
    inside[16:64, 8:56] = True  # the box, extended to JPEG blocks
    assert np.abs(face - plain)[~inside].mean() < 8
    for wrong in ("[1, 2, 3]", "[1, 2, 3, NaN]"):
        boxes.write_text(f'{{"face": [{wrong}]}}')
        with pytest.raises(BoxesError, match="boxes.json cannot be read as"):
            prepare("cc12m", tmp_path / "in", tmp_path / "new", processes=1, boxes=str(boxes))


def test_shards_have_about_the_requested_size(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "MB", 1000)
    source = archives.cc12m(tmp_path / "in", tars=5, n=8)
    size = (source / "00000.tar").stat().st_size
    one = prepare("cc12m", source, tmp_path / "one", shard_mb=10**6, processes=1)
    two = prepare("cc12m", source, tmp_path / "two", shard_mb=2 * size // 1000 + 1, processes=1)
    few = prepare("cc12m", source, tmp_path / "few", shard_mb=1, processes=1)
    names = [len(list((tmp_path / n).glob("*.array_record-*"))) for n in ("one", "two", "few")]
    assert names[:2] == [1, 3] and 20 < names[2] <= 40
    keys = []
    for name, manifest in (("one", one), ("two", two), ("few", few)):
        assert manifest["images"] == {"train": 40}
        keys.append([record["key"] for record in raw(tmp_path / name)])
    assert keys[0] == keys[1] == keys[2] and len(keys[0]) == 40


def test_several_processes_write_the_same_files_and_a_complete_set_is_not_changed(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(driver, "MB", 1000)
    source = archives.imagenet1k(tmp_path / "in", n=2, validation=4)
    manifest = prepare("imagenet1k", source, tmp_path / "a", shard_mb=10, processes=1)
    assert prepare("imagenet1k", source, tmp_path / "b", shard_mb=10, processes=2) == manifest
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    before = {path: path.stat() for path in (tmp_path / "a").iterdir()}
    assert prepare("imagenet1k", source, tmp_path / "a", shard_mb=10) is None
    assert {path: path.stat() for path in (tmp_path / "a").iterdir()} == before
    (tmp_path / "a" / ".prepare").mkdir()  # as if killed at the very end
    assert prepare("imagenet1k", source, tmp_path / "a", shard_mb=10) is None
    assert not (tmp_path / "a" / ".prepare").exists()
    report(None, "imagenet1k", tmp_path / "a")
    assert "Nothing to do" in capsys.readouterr().out
    with pytest.raises(OutputError, match="another prepare.shard_mb .10, not 20"):
        prepare("imagenet1k", source, tmp_path / "a", shard_mb=20)
    for path in source.iterdir():
        path.unlink()
    assert prepare("imagenet1k", source, tmp_path / "a", shard_mb=10) is None


def stop_after(monkeypatch, jobs):
    """Make preparation fail after `jobs` jobs; returns the list of finished job numbers."""
    original = driver.run_job
    done = []

    def run(job, settings):
        if len(done) == jobs:
            raise OSError("disk on fire")
        original(job, settings)
        done.append(job.number)

    monkeypatch.setattr(driver, "run_job", run)
    return done


def begun(tmp_path, monkeypatch):
    """Create a source of three tars, of which one is prepared."""
    source = archives.cc12m(tmp_path / "in", tars=3, n=3)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        with pytest.raises(OutputError, match="disk on fire; fix that"):
            prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)
    return source


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(driver, "MB", 1000)


def test_resume_runs_only_the_remaining_jobs(tmp_path, monkeypatch):
    source = begun(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="out is not finished; run mode prepare again"):
        TFDS(tmp_path / "out")
    with pytest.raises(OutputError, match="another prepare.shard_mb .1, not 2"):
        prepare("cc12m", source, tmp_path / "out", shard_mb=2, processes=1)
    (tmp_path / "out" / ".prepare" / "half.tmp").write_bytes(b"half a shard")
    with monkeypatch.context() as patch, pytest.raises(OutputError):
        stop_after(patch, 0)
        prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)
    assert not list((tmp_path / "out" / ".prepare").glob("*.tmp"))
    done = stop_after(monkeypatch, 99)
    assert prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)
    assert done == [1, 2]
    assert prepare("cc12m", source, tmp_path / "new", shard_mb=1, processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_source_is_an_error(tmp_path, monkeypatch, finished):
    source = begun(tmp_path, monkeypatch)
    if finished:
        prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)

    def again():
        return prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)

    path = source / "00000.tar"
    data = path.read_bytes()
    for change in (data[:-512], data[:600] + b"x" + data[601:], None):
        path.unlink() if change is None else path.write_bytes(change)
        os.utime(source / "00001.tar", ns=(1, 1))
        with pytest.raises(SourceError, match="00000.tar has changed since .*delete that folder"):
            again()
    path.write_bytes(data)  # the same content with a new mtime
    assert (again() is None) == finished


def test_changed_captions_and_boxes_are_errors(tmp_path, monkeypatch):
    source = archives.coco(tmp_path / "in")
    prepare("coco", source, tmp_path / "out", processes=1)
    boxes = tmp_path / "boxes.json"
    boxes.write_text("{}")
    assert prepare("coco", source, tmp_path / "out", boxes=str(boxes)) is None  # still no boxes
    boxes.write_text('{"a": [[0, 0, 1, 1]]}')
    with pytest.raises(OutputError, match="another prepare.boxes"):
        prepare("coco", source, tmp_path / "out", boxes=str(boxes))
    with pytest.raises(OutputError, match="another prepare.builder .coco, not cc12m"):
        prepare("cc12m", source, tmp_path / "out")
    path = source / "annotations" / "captions_val2014.json"
    path.write_text(path.read_text().replace("picture 2", "painting 2"))
    with pytest.raises(SourceError, match="val2014.*has changed"):
        prepare("coco", source, tmp_path / "out")


def test_resumes_after_a_kill_between_any_two_final_renames(tmp_path, monkeypatch):
    source = archives.imagenet1k(tmp_path / "in", n=1, validation=2)

    def again():
        return prepare("imagenet1k", source, tmp_path / "out", processes=1)

    original = os.replace
    calls = []

    def replace(*paths):
        calls.append(paths)
        if len(calls) == limit:
            raise KeyboardInterrupt
        original(*paths)

    limit = 0
    while True:
        limit += 1
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                again()
                break
            except KeyboardInterrupt:
                with pytest.raises(ValueError, match="not finished"):
                    TFDS(tmp_path / "out")
    assert limit > 8
    prepare("imagenet1k", source, tmp_path / "new", processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


@pytest.mark.parametrize("builder", ["cc12m", "coco", "folder", "imagenet1k"])
def test_a_source_that_disappears_is_not_a_damaged_one(tmp_path, monkeypatch, builder):
    options = {"zipped": True} if builder == "coco" else {}
    make = archives.classes if builder == "folder" else getattr(archives, builder)
    source, original = make(tmp_path / "in", **options), driver.run_job

    def run(job, settings):
        source.rename(tmp_path / "away")
        original(job, settings)

    with monkeypatch.context() as patch, pytest.raises(SourceError, match="No such file.*resume"):
        patch.setattr(driver, "run_job", run)
        prepare(builder, source, tmp_path / "out", processes=1)
    (tmp_path / "away").rename(source)
    assert not prepare(builder, source, tmp_path / "out", processes=1)["skipped"]


@pytest.mark.parametrize("builder", ["coco", "folder"])
def test_a_changed_image_is_an_error(tmp_path, builder):
    make = {"coco": archives.coco, "folder": archives.captions}[builder]
    source = make(tmp_path / "in")
    prepare(builder, source, tmp_path / "out", processes=1)
    image = min(source.rglob("*.jpg"))
    image.write_bytes(image.read_bytes()[:-1] + b"x")  # of the same size
    os.utime(image, ns=(2**62, 2**62))
    with pytest.raises(SourceError, match="has changed since"):
        prepare(builder, source, tmp_path / "out", processes=1)


def test_killed_workers_are_an_error(tmp_path, monkeypatch):
    pool = mock.MagicMock()
    pool.return_value.__enter__.return_value.submit.side_effect = BrokenProcessPool("died")
    pool.return_value.__exit__.return_value = False
    monkeypatch.setattr(driver, "ProcessPoolExecutor", pool)
    source = archives.cc12m(tmp_path / "in", tars=2, n=1)
    with pytest.raises(OutputError, match="killed, possibly for lack of memory; lower prepare"):
        prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=2)


def test_incompletely_written_shards_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "open_shard", lambda path: mock.Mock(**{"num_records()": 0}))
    source = archives.cc12m(tmp_path / "in", tars=1, n=1)
    with pytest.raises(OutputError, match="is incomplete after writing; is the disk full"):
        prepare("cc12m", source, tmp_path / "out", processes=1)


def test_lost_shards_are_an_error(tmp_path, monkeypatch):
    source = archives.cc12m(tmp_path / "in", tars=2, n=1)

    def lose(*_):
        (tmp_path / "out" / ".prepare" / "00001-000.array_record").unlink()
        return original(*_)

    original = driver.finish.finish
    monkeypatch.setattr(driver.finish, "finish", lose)
    with pytest.raises(OutputError, match="00001-000.array_record is missing; delete .*out to pre"):
        prepare("cc12m", source, tmp_path / "out", shard_mb=1, processes=1)


def test_folders_with_other_files_are_not_touched(tmp_path, monkeypatch):
    source = archives.cc12m(tmp_path / "in", tars=1, n=1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="out holds other files"):
        prepare("cc12m", source, out)
    (out / "dataset_info.json").write_text("{}")
    with pytest.raises(OutputError, match="mode prepare has not made"):
        prepare("cc12m", source, out)
    busy = pytest.raises(OutputError, match="new is being written by another process")
    with driver.locked(tmp_path / "new", tmp_path / "new" / ".prepare"), busy:
        prepare("cc12m", source, tmp_path / "new")


def test_too_small_a_disk_is_an_error_before_the_start(tmp_path, monkeypatch):
    source = archives.cc12m(tmp_path / "in", tars=1, n=1)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(driver.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"needs about 1\d\.\d kB, and .*out has 0.1 kB free"):
        prepare("cc12m", source, tmp_path / "out", processes=1)
    assert not list((tmp_path / "out").rglob("*.array_record*"))


COMMAND = """
import sys
from pathlib import Path
from condiff_jax.data.builders import prepare
if __name__ == "__main__":
    prepare.MB = 1000
    prepare.prepare("cc12m", Path(sys.argv[1]), Path(sys.argv[2]), shard_mb=60, processes=2)
"""


def children(pid):
    pids = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        pids |= {int(child) for child in (task / "children").read_text().split()}
    return pids


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_resumes_after_sigkill(tmp_path, capsys):
    source = archives.cc12m(tmp_path / "in", tars=40, n=12)
    script = tmp_path / "prepare_it.py"
    script.write_text(COMMAND)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    work, deadline = tmp_path / "out" / ".prepare", time.time() + 60
    while len(list(work.glob("0*.json"))) < 5:
        assert time.time() < deadline and first.poll() is None, first.communicate()
        time.sleep(0.01)
    workers = children(first.pid)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=30)
    while any(map(alive, workers)):  # workers end with their parent
        assert time.time() < deadline
        time.sleep(0.01)
    done = list(work.glob("0*.json"))
    assert 5 <= len(done) < 40
    with pytest.raises(ValueError, match="not finished"):
        TFDS(tmp_path / "out")
    driver.prepare("cc12m", source, tmp_path / "out", shard_mb=60, processes=1)
    assert not work.exists() and f"{len(done)} of 40 parts are done" in capsys.readouterr().out
    driver.prepare("cc12m", source, tmp_path / "new", shard_mb=60, processes=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "new")
