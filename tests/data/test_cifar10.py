"""CIFAR-10's archives: both forms, in folders and packed; what is damaged, wrong or malicious."""

import gzip
import io
import os
import pickle
import shutil
import tarfile
import zlib

import numpy as np
import pytest

from condiff_jax.config.errors import ConfigError
from condiff_jax.data import cifar10
from condiff_jax.data.cifar10 import CLASSES, FORMS, ROW, Cifar10
from condiff_jax.data.pipeline import batches, create_source, open_source
from condiff_jax.evaluation.reference import Reference
from condiff_jax.objectives.vocabulary import create_vocabulary
from tests import tiny

COUNT = 20  # pictures a file, here
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(cifar10, "COUNT", COUNT)


def content(name):
    """(rows, labels) of a file."""
    generator = np.random.default_rng(NAMES.index(name))
    return generator.integers(0, 256, (COUNT, ROW), np.uint8), generator.integers(0, 10, COUNT)


class Python2(pickle._Pickler):
    """Writes bytes as the strings of Python 2, in which CIFAR-10 was pickled."""

    def save_string(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch = pickle._Pickler.dispatch | {bytes: save_string}


def pickled(rows, labels):
    buffer = io.BytesIO()
    values = {b"data": rows, b"labels": labels, b"batch_label": b"batch"}
    Python2(buffer, protocol=2).dump(values)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def binary(rows, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), rows], 1).tobytes()


WRITE = {"": lambda rows, labels: pickled(rows, labels.tolist()), ".bin": binary}


def unpacked(form, folder):
    """The folder that the form's archive unpacks to."""
    place = folder / form.folder
    place.mkdir(parents=True)
    for name in NAMES:
        (place / f"{name}{form.ending}").write_bytes(WRITE[form.ending](*content(name)))
    return place


def packed(form, folder):
    """The archive, alone."""
    place, path = unpacked(form, folder), folder / form.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(place, form.folder)
    shutil.rmtree(place)
    return path


@pytest.fixture(params=FORMS, ids=lambda form: form.folder)
def form(request):
    return request.param


@pytest.mark.parametrize("make", [unpacked, packed])
def test_pictures_are_those_of_the_files_in_order(form, make, tmp_path):
    path = make(form, tmp_path / "x")
    for place in (path, path.parent):
        source = Cifar10(place)
        assert len(source) == 5 * COUNT and source.classes == CLASSES
        rows, labels = content("data_batch_2")
        record = source[COUNT + 3]
        assert record["image"].dtype == np.uint8 and record["image"].shape == (32, 32, 3)
        assert record["image"][5, 7, 1] == rows[3, 1024 + 5 * 32 + 7]  # row 5, column 7, green
        assert record["label"] == labels[3] and record["label"].dtype == np.int32
        captions = [source[COUNT + i]["caption"] for i in range(COUNT)]
        assert captions == [CLASSES[label] for label in labels]
        held = Cifar10(place, "validation")
        assert len(held) == COUNT
        np.testing.assert_array_equal(
            held[0]["image"][..., 2].ravel(), content(NAMES[5])[0][0, 2048:]
        )


def test_an_archive_may_be_decompressed(form, tmp_path, monkeypatch):
    path = packed(form, tmp_path)
    plain = path.with_suffix("")  # .tar
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    source = Cifar10(f"~/{plain.name}")
    assert [source[i]["label"] for i in range(COUNT)] == content("data_batch_1")[1].tolist()


def test_all_batches_are_read_and_numbers_end(form, tmp_path):
    source = Cifar10(unpacked(form, tmp_path))
    labels = np.concatenate([content(name)[1] for name in NAMES[:5]])
    assert [source[i]["label"] for i in range(len(source))] == labels.tolist()
    with pytest.raises(IndexError):
        source[len(source)]


def test_other_processes_read_the_files_themselves(form, tmp_path):
    source = Cifar10(unpacked(form, tmp_path))
    data = pickle.dumps(source)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data)[7]["image"], source[7]["image"])


def fields(path, **others):
    return {"data.name": "cifar10", "data.path": str(path), "data.semantics": "class"} | others


def test_the_pipeline_and_references_take_it(form, tmp_path):
    path = unpacked(form, tmp_path)
    plain = {"data.resolution": 32, "data.crop": (1.0, 1.0), "data.flip": False}
    config = tiny.config(**fields(path, **plain))
    source = create_source(config)
    batch = next(batches(config, source))
    known = {source[i]["image"].tobytes(): source[i]["label"] for i in range(len(source))}
    assert [known[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
    assert create_vocabulary(config, source).classes == CLASSES
    assert Reference(config).identity["count"] == 5 * COUNT
    held = tiny.config(**fields(path, **plain | {"evaluation.reference": "validation"}))
    assert Reference(held).digest() != Reference(config).digest()


def test_captions_are_the_names(tmp_path):
    source = Cifar10(unpacked(FORMS[0], tmp_path))
    assert sorted(source.vocabulary()) == sorted(CLASSES)


# ---------------------------------------------------------------------------------------------
# What is no CIFAR-10


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = unpacked(FORMS[0], tmp_path)
    for evil in (Evil(), {b"data": Evil(), b"labels": []}):
        (place / "data_batch_1").write_bytes(pickle.dumps(evil))
        with pytest.raises(
            ValueError, match=r"data_batch_1 .*(posix|nt)\.mkdir, which is no array"
        ):
            Cifar10(place)
    pickle.loads(pickle.dumps(Evil()))  # what the standard library would have done
    assert (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "os.system"])
def test_pickles_name_nothing_but_arrays(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    place = unpacked(FORMS[0], tmp_path)
    code = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
    (place / "data_batch_3").write_bytes(code)
    with pytest.raises(ValueError, match=f"data_batch_3 .*{name}, which is no array"):
        Cifar10(place)


def _rows(rows, labels):
    return rows[:-1], labels[:-1]


def _pixels(rows, labels):
    return rows[:, :-1], labels


def _label(rows, labels):
    return rows, np.where(np.arange(COUNT) == 3, 10, labels)


@pytest.mark.parametrize(
    "change, messages",
    [
        (_rows, (r"pictures are uint8 \(19, 3072\)", r"pictures are uint8 \(19, 3072\)")),
        (_pixels, (r"pictures are uint8 \(20, 3071\)", "no multiple of 3073")),
        (_label, ("labels are 0 to 10, not 0 to 9", "labels are 0 to 10, not 0 to 9")),
    ],
)
def test_batches_of_another_kind_are_named(form, change, messages, tmp_path):
    place = unpacked(form, tmp_path)
    rows, labels = change(*content("data_batch_4"))
    (place / f"data_batch_4{form.ending}").write_bytes(WRITE[form.ending](rows, labels))
    message = messages[FORMS.index(form)]
    with pytest.raises(ValueError, match=f"data_batch_4.* is no batch of CIFAR-10 .*{message}"):
        Cifar10(place)
    assert len(Cifar10(place, "validation")) == COUNT  # which is whole


@pytest.mark.parametrize(
    "rows, labels, message",
    [
        (np.zeros((COUNT, ROW), np.float32), [0] * COUNT, "pictures are float32"),
        (np.zeros((COUNT, ROW), np.uint8), [0] * (COUNT - 1), r"labels are int64 \(19,\), not 20"),
        (np.zeros((COUNT, ROW), np.uint8), [0.5] * COUNT, "labels are float64"),
        (np.zeros((COUNT, ROW), np.uint8), [-1] * COUNT, "labels are -1 to -1, not 0 to 9"),
    ],
)
def test_pickles_hold_pictures_and_labels(rows, labels, message, tmp_path):
    place = unpacked(FORMS[0], tmp_path)
    (place / "data_batch_2").write_bytes(pickled(rows, labels))
    with pytest.raises(ValueError, match=f"data_batch_2 is no batch of CIFAR-10 .*{message}"):
        Cifar10(place)


def test_damaged_files_are_named(form, tmp_path):
    archive = packed(form, tmp_path)
    data = archive.read_bytes()
    gzipped, plain = zlib.compressobj(wbits=31), gzip.decompress(data)
    half = gzipped.compress(plain[: len(plain) // 2]) + gzipped.flush(zlib.Z_FULL_FLUSH)
    other = half + b"\xff" * 100  # no block of compressed data begins so
    for damaged in (data[: len(data) // 2], other, b"no archive", b""):
        archive.write_bytes(damaged)
        with pytest.raises((ValueError, FileNotFoundError), match=archive.name) as error:
            Cifar10(archive)
        assert "\n" not in str(error.value)
    with tarfile.open(archive, "w:gz") as folders:
        for name in NAMES:
            member = tarfile.TarInfo(f"{name}{form.ending}")
            member.type = tarfile.DIRTYPE
            folders.addfile(member)
    with pytest.raises(FileNotFoundError, match=f"{archive.name} has no data_batch_1"):
        Cifar10(archive)
    archive.unlink()
    place = unpacked(form, tmp_path)
    first = place / f"data_batch_1{form.ending}"
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(ValueError, match="data_batch_1.* is no batch"):
        Cifar10(place)
    (place / f"data_batch_5{form.ending}").unlink()
    first.write_bytes(WRITE[form.ending](*content("data_batch_1")))
    with pytest.raises(FileNotFoundError, match=f"has no data_batch_5{form.ending}; get"):
        Cifar10(place)


def test_pickles_of_something_else_are_named(tmp_path):
    place = unpacked(FORMS[0], tmp_path)
    for other in ([1, 2], {b"labels": [1]}, {b"data": "x", b"labels": "y"}):
        (place / "data_batch_1").write_bytes(pickle.dumps(other, protocol=2))
        with pytest.raises(ValueError, match="data_batch_1 is"):
            Cifar10(place)


def test_other_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give CIFAR-10's"):
        Cifar10(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no CIFAR-10; give cifar-10-batches-py or"):
        Cifar10(tmp_path)
    with pytest.raises(ValueError, match="split='val'"):
        Cifar10(tmp_path, "val")
    with pytest.raises(ConfigError, match="^data.path: .* is no CIFAR-10"):
        open_source(tiny.config(**fields(tmp_path)))
    with pytest.raises(ConfigError, match="^data.path: empty, but data.name=cifar10 needs a path"):
        open_source(tiny.config(**fields("")))
