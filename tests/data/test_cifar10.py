"""Tests of CIFAR-10's archives: both forms, unpacked and packed, damaged and malicious files."""

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

COUNT = 20  # images per file in these tests
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(cifar10, "COUNT", COUNT)


def content(name):
    """Random (rows, labels) of a file, seeded by its name."""
    generator = np.random.default_rng(NAMES.index(name))
    return generator.integers(0, 256, (COUNT, ROW), np.uint8), generator.integers(0, 10, COUNT)


class Python2(pickle._Pickler):
    """Pickle bytes as Python 2 strings, as the official archive does."""

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
    """Create the folder that the form's archive unpacks to."""
    root = folder / form.folder
    root.mkdir(parents=True)
    for name in NAMES:
        (root / f"{name}{form.ending}").write_bytes(WRITE[form.ending](*content(name)))
    return root


def packed(form, folder):
    """Create the archive without the folder that it unpacks to."""
    root = unpacked(form, folder)
    path = folder / form.archive
    with tarfile.open(path, "w:gz") as archive:
        archive.add(root, form.folder)
    shutil.rmtree(root)
    return path


@pytest.fixture(params=FORMS, ids=lambda form: form.folder)
def form(request):
    return request.param


@pytest.mark.parametrize("make", [unpacked, packed])
def test_images_are_those_of_the_files_in_order(form, make, tmp_path):
    path = make(form, tmp_path / "x")
    for location in (path, path.parent):
        source = Cifar10(location)
        assert len(source) == 5 * COUNT and source.classes == CLASSES
        rows, labels = content("data_batch_2")
        record = source[COUNT + 3]
        assert record["image"].dtype == np.uint8 and record["image"].shape == (32, 32, 3)
        assert record["image"][5, 7, 1] == rows[3, 1024 + 5 * 32 + 7]  # row 5, column 7, green
        assert record["label"] == labels[3] and record["label"].dtype == np.int32
        captions = [source[COUNT + i]["caption"] for i in range(COUNT)]
        assert captions == [CLASSES[label] for label in labels]
        validation = Cifar10(location, "validation")
        assert len(validation) == COUNT
        np.testing.assert_array_equal(
            validation[0]["image"][..., 2].ravel(), content(NAMES[5])[0][0, 2048:]
        )


def test_an_archive_may_be_decompressed(form, tmp_path, monkeypatch):
    path = packed(form, tmp_path)
    plain = path.with_suffix("")  # .tar
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    path.unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    source = Cifar10(f"~/{plain.name}")
    assert [source[i]["label"] for i in range(COUNT)] == content("data_batch_1")[1].tolist()


def test_all_batches_are_read_and_indices_end(form, tmp_path):
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


def fields(path, **overrides):
    return {"data.name": "cifar10", "data.path": str(path), "data.semantics": "class"} | overrides


def test_the_pipeline_and_references_accept_it(form, tmp_path):
    path = unpacked(form, tmp_path)
    plain = {"data.resolution": 32, "data.crop": (1.0, 1.0), "data.flip": False}
    config = tiny.config(**fields(path, **plain))
    source = create_source(config)
    batch = next(batches(config, source))
    labels = {source[i]["image"].tobytes(): source[i]["label"] for i in range(len(source))}
    assert [labels[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()
    assert create_vocabulary(config, source).classes == CLASSES
    assert Reference(config).identity["count"] == 5 * COUNT
    validation = tiny.config(**fields(path, **plain | {"evaluation.reference": "validation"}))
    assert Reference(validation).digest() != Reference(config).digest()


def test_captions_are_the_class_names(tmp_path):
    source = Cifar10(unpacked(FORMS[0], tmp_path))
    assert sorted(source.vocabulary()) == sorted(CLASSES)


# ---------------------------------------------------------------------------------------------
# Errors


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = unpacked(FORMS[0], tmp_path)
    for evil in (Evil(), {b"data": Evil(), b"labels": []}):
        (root / "data_batch_1").write_bytes(pickle.dumps(evil))
        with pytest.raises(
            ValueError, match=r"data_batch_1 .*(posix|nt)\.mkdir, which is not a numpy array"
        ):
            Cifar10(root)
    pickle.loads(pickle.dumps(Evil()))  # the standard library does run it
    assert (tmp_path / "hacked").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "builtins.getattr", "numpy.load", "os.system"])
def test_pickles_may_load_arrays_only(name, tmp_path):
    module, _, attribute = name.rpartition(".")
    root = unpacked(FORMS[0], tmp_path)
    code = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
    (root / "data_batch_3").write_bytes(code)
    with pytest.raises(ValueError, match=f"data_batch_3 .*{name}, which is not a numpy array"):
        Cifar10(root)


def _rows(rows, labels):
    return rows[:-1], labels[:-1]


def _pixels(rows, labels):
    return rows[:, :-1], labels


def _label(rows, labels):
    return rows, np.where(np.arange(COUNT) == 3, 10, labels)


@pytest.mark.parametrize(
    "change, messages",
    [
        (_rows, (r"images are uint8 \(19, 3072\)", r"images are uint8 \(19, 3072\)")),
        (_pixels, (r"images are uint8 \(20, 3071\)", "not a multiple of 3073")),
        (_label, ("labels are 0 to 10, not 0 to 9", "labels are 0 to 10, not 0 to 9")),
    ],
)
def test_batches_of_another_shape_are_named(form, change, messages, tmp_path):
    root = unpacked(form, tmp_path)
    rows, labels = change(*content("data_batch_4"))
    (root / f"data_batch_4{form.ending}").write_bytes(WRITE[form.ending](rows, labels))
    message = messages[FORMS.index(form)]
    with pytest.raises(ValueError, match=f"data_batch_4.* is not a batch of CIFAR-10 .*{message}"):
        Cifar10(root)
    assert len(Cifar10(root, "validation")) == COUNT  # its file is intact


@pytest.mark.parametrize(
    "rows, labels, message",
    [
        (np.zeros((COUNT, ROW), np.float32), [0] * COUNT, "images are float32"),
        (np.zeros((COUNT, ROW), np.uint8), [0] * (COUNT - 1), r"labels are int64 \(19,\), not 20"),
        (np.zeros((COUNT, ROW), np.uint8), [0.5] * COUNT, "labels are float64"),
        (np.zeros((COUNT, ROW), np.uint8), [-1] * COUNT, "labels are -1 to -1, not 0 to 9"),
    ],
)
def test_pickles_must_contain_images_and_labels(rows, labels, message, tmp_path):
    root = unpacked(FORMS[0], tmp_path)
    (root / "data_batch_2").write_bytes(pickled(rows, labels))
    with pytest.raises(ValueError, match=f"data_batch_2 is not a batch of CIFAR-10 .*{message}"):
        Cifar10(root)


def test_damaged_files_are_named(form, tmp_path):
    archive = packed(form, tmp_path)
    data = archive.read_bytes()
    gzipped, plain = zlib.compressobj(wbits=31), gzip.decompress(data)
    half = gzipped.compress(plain[: len(plain) // 2]) + gzipped.flush(zlib.Z_FULL_FLUSH)
    invalid = half + b"\xff" * 100  # no valid block of compressed data begins with these bytes
    for damaged in (data[: len(data) // 2], invalid, b"no archive", b""):
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
    root = unpacked(form, tmp_path)
    first = root / f"data_batch_1{form.ending}"
    first.write_bytes(first.read_bytes()[:-5])
    with pytest.raises(ValueError, match="data_batch_1.* is not a batch"):
        Cifar10(root)
    (root / f"data_batch_5{form.ending}").unlink()
    first.write_bytes(WRITE[form.ending](*content("data_batch_1")))
    with pytest.raises(FileNotFoundError, match=f"has no data_batch_5{form.ending}; download"):
        Cifar10(root)


def test_pickles_with_other_content_are_named(tmp_path):
    root = unpacked(FORMS[0], tmp_path)
    for value in ([1, 2], {b"labels": [1]}, {b"data": "x", b"labels": "y"}):
        (root / "data_batch_1").write_bytes(pickle.dumps(value, protocol=2))
        with pytest.raises(ValueError, match="data_batch_1 is"):
            Cifar10(root)


def test_wrong_paths_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist; give CIFAR-10's"):
        Cifar10(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not CIFAR-10; give cifar-10-batches-py or"):
        Cifar10(tmp_path)
    with pytest.raises(ValueError, match="split='val'"):
        Cifar10(tmp_path, "val")
    with pytest.raises(ConfigError, match="^data.path: .* is not CIFAR-10"):
        open_source(tiny.config(**fields(tmp_path)))
    with pytest.raises(ConfigError, match="^data.path: empty, but data.name=cifar10 needs a path"):
        open_source(tiny.config(**fields("")))
