"""Tests that the tar reader agrees with tarfile, caches its index, and skips damaged records."""

import io
import json
import multiprocessing
import os
import pickle
import tarfile

import numpy as np
import pytest
from absl import logging
from PIL import Image

from condiff_jax.data.images import decode
from condiff_jax.data.webdataset import Webdataset


@pytest.fixture(autouse=True)
def home(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def warnings(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: lines.append(text % args))
    return lines


def encode(pixels, format="PNG", mode=None, **options):
    out, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(out, format, **options)
    return out.getvalue()


def random_image(seed, height=5, width=7):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(seeds):
    for seed in seeds:
        yield f"{seed:04d}.png", encode(random_image(seed, 4 + seed % 3))
        yield f"{seed:04d}.txt", f"picture {seed}".encode()
        yield f"{seed:04d}.cls", str(seed % 5).encode()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    write_tar(root / "train-00000.tar", samples(range(4)))
    write_tar(root / "train-00001.tar", samples(range(4, 9)))
    write_tar(root / "val-00000.tar", samples(range(20, 22)))
    return root


def forbid_tarfile(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a tar was opened")

    monkeypatch.setattr(tarfile, "open", fail)


def test_random_access_equals_sequential_reading(folder):
    members = []
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            members += [tar.extractfile(m).read() for m in tar]
    expected = list(zip(members[::3], members[1::3], members[2::3], strict=True))
    data = Webdataset(folder)
    assert len(data) == len(expected) == 9
    for i in np.random.default_rng(0).permutation(9):
        item, (png, text, label) = data[i], expected[i]
        with Image.open(io.BytesIO(png)) as image:
            np.testing.assert_array_equal(item["image"], np.asarray(image))
        assert item["caption"] == text.decode()
        assert (item["label"], item["broken"]) == (int(label), 0)
        assert {item[k].dtype.name for k in ("label", "broken")} == {"int32"}
    assert data.classes == tuple("01234")
    assert data[-1]["caption"] == "picture 8"
    with pytest.raises(IndexError):
        data[9]
    assert len(list(data)) == 9


def test_splits_and_single_tar(folder, tmp_path):
    assert list(Webdataset(folder, "validation").captions()) == ["picture 20", "picture 21"]
    assert len(Webdataset(folder / "train-00001.tar")) == 5
    write_tar(tmp_path / "all.tar", samples(range(3)))
    write_tar(tmp_path / "more.tar", samples(range(2)))
    assert len(Webdataset(tmp_path)) == 5
    assert len(Webdataset(tmp_path / "all.tar")) == 3
    assert repr(Webdataset(tmp_path)) == f"Webdataset({str(tmp_path)!r}, split='train')"


def test_captions_keys_and_labels(tmp_path):
    png = encode(random_image(0))
    write_tar(
        tmp_path / "a.tar",
        [
            ("README.md", b"not a sample"),
            ("../x.y/1.PNG", png),
            ("../x.y/1.json", json.dumps({"caption": "from json"}).encode()),
            ("x/2.png", png),
            ("x/2.txt", b"caf\xe9 \n"),
            ("x/2.json", b'{"caption": "unused"}'),
            ("x/2.cls", b"-1"),
            ("x/3.png", png),
            ("x/3.json", b'{"caption": 3'),
            ("x/3.cls", b"7\n"),
            ("y/3.png", png),
            ("y/3.json", b'{"caption": 3}'),
            ("y/3.cls", b"99999999999"),
        ],
    )
    data = Webdataset(tmp_path)
    assert [x["caption"] for x in data] == ["from json", "caf\ufffd", "", ""]
    assert [x["label"] for x in data] == [0, 0, 7, 0]
    assert len(data.classes) == 8
    assert all(x["broken"] == 0 for x in data)


def test_samples_may_be_interleaved_and_a_repeated_member_starts_a_new_one(tmp_path):
    pngs = [encode(random_image(i)) for i in range(3)]
    write_tar(
        tmp_path / "a.tar",
        [
            ("1.png", pngs[0]),
            ("2.png", pngs[1]),
            ("1.txt", b"one"),
            ("2.txt", b"two"),
            ("1.png", pngs[2]),
            ("1.txt", b"three"),
        ],
    )
    write_tar(tmp_path / "b.tar", [("1.png", pngs[0]), ("1.txt", b"four")])
    data = Webdataset(tmp_path)
    assert list(data.captions()) == ["one", "two", "three", "four"]
    for item, seed in zip(data, (0, 1, 2, 0), strict=True):
        np.testing.assert_array_equal(item["image"], random_image(seed))


def test_vocabulary_orders_by_count_then_alphabet(tmp_path):
    png = encode(random_image(0))
    texts = [b"The cat's hat, the HAT", b"a bee; a cow", b"the end"]
    write_tar(
        tmp_path / "a.tar",
        [m for i, t in enumerate(texts) for m in ((f"{i}.png", png), (f"{i}.txt", t))],
    )
    words = ("the", "a", "hat", "bee", "cat's", "cow", "end")
    assert Webdataset(tmp_path).vocabulary() == words
    assert Webdataset(tmp_path).vocabulary(max_words=3) == words[:3]


def test_index_is_reused_and_refreshed(folder, monkeypatch):
    first = Webdataset(folder)
    assert [p.name for p in folder.iterdir() if ".npz" in p.name] == [
        p.name for p in folder.glob(".index-train-*.npz")
    ]
    with monkeypatch.context() as patch:
        forbid_tarfile(patch)
        again = Webdataset(folder)
        assert list(again.captions()) == list(first.captions())
        assert again.classes == first.classes
        shard = folder / "train-00001.tar"
        os.utime(shard, ns=(1, 1))
        with pytest.raises(AssertionError, match="a tar was opened"):
            Webdataset(folder)
    write_tar(shard, samples(range(30, 32)))
    assert list(Webdataset(folder).captions())[4:] == ["picture 30", "picture 31"]


def test_cache_folders(folder, home, tmp_path, monkeypatch, warnings):
    Webdataset(folder, cache=tmp_path / "mine" / "deep")
    assert len(list((tmp_path / "mine" / "deep").iterdir())) == 1
    assert not list(folder.glob(".index*"))
    folder.chmod(0o555)
    try:
        Webdataset(folder)
        assert not list(folder.glob(".index*"))
        assert len(list((home / "condiff_jax").glob(".index-train-*.npz"))) == 1
        forbid_tarfile(monkeypatch)
        assert len(Webdataset(folder)) == 9
    finally:
        folder.chmod(0o755)
    assert not warnings


def test_unusable_cache_warns_and_damaged_cache_is_rebuilt(folder, tmp_path, warnings):
    (tmp_path / "file").touch()
    assert len(Webdataset(folder, cache=tmp_path / "file")) == 9
    assert len(warnings) == 1 and str(tmp_path / "file") in warnings[0]
    Webdataset(folder)
    (cached,) = folder.glob(".index-*")
    for damage in (b"", cached.read_bytes()[:700], b"junk"):
        cached.write_bytes(damage)
        assert len(Webdataset(folder)) == 9


def read_caption(data, i, queue):
    queue.put(data[i]["caption"])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_pickles_and_forks(folder, monkeypatch):
    data = Webdataset(folder)
    assert data[0]["broken"] == 0  # opens a shard
    with monkeypatch.context() as patch:
        forbid_tarfile(patch)
        clone = pickle.loads(pickle.dumps(data))
    for i in range(9):
        np.testing.assert_array_equal(clone[i]["image"], data[i]["image"])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_caption, args=(data, 2, queue))
    child.start()
    assert queue.get(timeout=20) == "picture 2" == data[2]["caption"]
    child.join()


def test_open_files_are_bounded_and_closed(folder):
    def count():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    before = count()
    data = Webdataset(folder)
    list(data)
    assert count() == before + 2
    del data
    assert count() == before


def test_broken_records_are_skipped_counted_and_logged_once(tmp_path, warnings, monkeypatch):
    good = encode(random_image(0))
    noise = encode(random_image(1, 40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    bomb = encode(np.zeros((100, 51, 3), np.uint8))
    members = [
        ("0.png", good),
        ("0.txt", b"zero"),
        ("1.png", noise[: len(noise) // 2]),
        ("1.txt", b"cut"),
        ("2.txt", b"no image"),
        ("3.jpg", b""),
        ("3.txt", b"empty"),
        ("4.png", bomb),
        ("4.txt", b"bomb"),
        ("5.webp", good),
        ("5.txt", b"five"),
        ("6.png", b"GIF89a" + bytes(40)),
        ("6.txt", b"other"),
    ]
    write_tar(tmp_path / "a.tar", members)
    data = Webdataset(tmp_path)
    with pytest.warns(Image.DecompressionBombWarning):
        items = list(data)
    assert [int(x["broken"]) for x in items] == [0, 4, 3, 2, 1, 0, 1]
    assert [x["caption"] for x in items] == ["zero"] + ["five"] * 5 + ["zero"]
    list(data)
    assert len(warnings) == 5
    for line, key in zip(warnings, "12346", strict=True):
        assert f"record {key} of {tmp_path / 'a.tar'}" in line
    assert list(data.captions())[1] == "cut"


def test_all_broken(tmp_path, warnings):
    write_tar(tmp_path / "a.tar", [("0.png", b"x"), ("1.png", b"y"), ("2.txt", b"z")])
    with pytest.raises(ValueError, match=f"{tmp_path} has no decodable train image"):
        Webdataset(tmp_path)[1]
    assert len(warnings) == 3


def test_bad_inputs(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        Webdataset(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no \*.tar"):
        Webdataset(tmp_path)
    with pytest.raises(ValueError, match="split='test'"):
        Webdataset(folder, "test")
    (folder / "val-00000.tar").unlink()
    with pytest.raises(ValueError, match="no validation shards, only train"):
        Webdataset(folder, "validation")
    write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(ValueError, match=f"{tmp_path} has no train samples"):
        Webdataset(tmp_path)
    with pytest.raises(ValueError, match="empty.tar has no train samples"):
        Webdataset(tmp_path / "empty.tar")


@pytest.mark.parametrize("size", [0, 100, 512, 700, 1024 + 100, 1536 + 60])
def test_truncated_tar_is_named(folder, size):
    # The first members end at 1024 (png) and 2048 (txt), so both headers and contents are cut.
    shard = folder / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:size])
    with pytest.raises(ValueError, match="train-00001.tar is truncated") as error:
        Webdataset(folder)
    assert "\n" not in str(error.value)


def test_damaged_header_and_compressed_tar(folder):
    shard = folder / "train-00000.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[1024:1100] = b"\xff" * 76
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match="train-00000.tar is truncated or not an uncompressed tar"):
        Webdataset(folder)
    with tarfile.open(shard, "w:gz"):
        pass
    with pytest.raises(ValueError, match="train-00000.tar is truncated or not an uncompressed tar"):
        Webdataset(folder)


def test_alpha_is_composited_over_white():
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 200, [[0, 128, 255], [255, 0, 64]]
    alpha = rgba[..., 3:] / 255
    expected = alpha * rgba[..., :3] + (1 - alpha) * 255
    assert np.abs(decode(encode(rgba)).astype(float) - expected).max() <= 1
    assert (decode(encode(rgba))[0, 0] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    out = io.BytesIO()
    palette.save(out, "PNG", transparency=0)
    assert decode(out.getvalue()).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    gray = decode(encode(np.array([[[7, 255], [7, 0]]], np.uint8)))
    assert gray.tolist() == [[[7] * 3, [255] * 3]]


def test_gray_16_bit_bilevel_and_cmyk():
    gray = random_image(0)[..., 0]
    expected = np.repeat(gray[..., None], 3, -1)
    np.testing.assert_array_equal(decode(encode(gray)), expected)
    deep = gray.astype(np.uint16) * 256 + gray[::-1]
    np.testing.assert_array_equal(decode(encode(deep)), expected)
    bits = gray > 127
    np.testing.assert_array_equal(decode(encode(bits))[..., 1], bits * 255)
    color = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    cmyk = decode(encode(color, "JPEG", "CMYK", quality=95))
    assert cmyk.shape == color.shape and cmyk.dtype == np.uint8
    assert np.abs(cmyk.astype(int) - color).max() <= 6
    webp = encode(random_image(3), "WEBP", lossless=True)
    np.testing.assert_array_equal(decode(webp), random_image(3))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation):
    upright = random_image(1)
    stored = {  # as a camera with that orientation tag stores the upright image
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: np.rot90(upright, 2).swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(decode(data), upright)


def test_no_pickle_in_the_index(folder):
    Webdataset(folder)
    (cached,) = folder.glob(".index-*")
    with np.load(cached, allow_pickle=False) as data:
        assert all(data[name].dtype != object for name in data.files)
