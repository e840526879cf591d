"""CIFAR-10 from its official archives: the Python (pickle) version and the binary version."""

from __future__ import annotations

import dataclasses
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from condiff_jax.data.records import by_frequency, count_words

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
SIDE = 32  # pixels
ROW = 3 * SIDE**2  # bytes of an image: its red, green and blue planes
COUNT = 10_000  # images in a file
SPLITS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "validation": ("test_batch",)}


class _Unpickler(pickle.Unpickler):
    """Load containers, numbers, strings and numpy arrays only; other globals are an error."""

    # The official pickles use module names of numpy 1; the others are those of numpy 2.
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    allowed |= dict.fromkeys(
        [("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")],
        np.empty(0).__reduce__()[0],
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it loads {module}.{name}, which is not a numpy array")
        return self.allowed[module, name]


def _read_pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    values = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(values[b"data"]), np.asarray(values[b"labels"])


def _read_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(content, np.uint8)
    if len(rows) % (1 + ROW):
        raise ValueError(f"its size of {len(rows)} bytes is not a multiple of {1 + ROW}")
    rows = rows.reshape(-1, 1 + ROW)
    return rows[:, 1:], rows[:, 0]


@dataclasses.dataclass(frozen=True)
class Form:
    """One of the official archives; read(content of a file) -> rows (N, ROW), labels (N,)."""

    folder: str
    archive: str
    ending: str
    read: Callable[[bytes], tuple[np.ndarray, np.ndarray]]


FORMS = (
    Form("cifar-10-batches-py", "cifar-10-python.tar.gz", "", _read_pickled),
    Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", ".bin", _read_binary),
)


class Cifar10:
    """A split as records of image uint8 (32, 32, 3), label, and the class name as caption.

    path: an archive, the folder it unpacks to, or a folder that contains either. The split is
    held in memory. ValueError or FileNotFoundError if the path is not CIFAR-10.
    """

    classes = CLASSES

    def __init__(self, path, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        self.path = Path(path).expanduser()
        self.split = split
        self._load()

    def _load(self) -> None:
        location, form = _find(self.path)
        batches = []
        for name, content in _contents(location, form, SPLITS[self.split]):
            try:
                batches.append(_check(*form.read(content)))
            except Exception as error:  # a damaged pickle can raise nearly anything
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"{location}: {name} is not a batch of CIFAR-10 ({reason}); "
                    "download the archive again"
                ) from error
        rows, labels = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
        self._images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        self._labels = labels.astype(np.int32)

    # Pickles exclude the arrays: worker processes read the files themselves.
    def __getstate__(self):
        return {"path": self.path, "split": self.split}

    def __setstate__(self, state):
        vars(self).update(state)
        self._load()

    def __repr__(self):
        return f"Cifar10({str(self.path)!r}, split={self.split!r})"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, i: int) -> dict:
        label = self._labels[i]
        image = np.ascontiguousarray(self._images[i])
        return {"image": image, "caption": CLASSES[label], "label": label}

    def vocabulary(self) -> tuple[str, ...]:
        """Words of the class names."""
        return tuple(by_frequency(count_words(CLASSES)))


def _find(path: Path) -> tuple[Path, Form]:
    """Locate the folder or archive at or inside a path, and determine its form."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give CIFAR-10's folder or archive")
    for form in FORMS:
        if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
            if ("bin" in path.name) == (form.ending == ".bin"):
                return path, form
            continue
        first_file = SPLITS["train"][0] + form.ending
        for folder in (path, path / form.folder):
            if (folder / first_file).is_file():
                return folder, form
        if (path / form.archive).is_file():
            return path / form.archive, form
    names = " or ".join(f"{form.folder} or {form.archive}" for form in FORMS)
    raise ValueError(f"{path} is not CIFAR-10; give {names}, or the folder that contains it")


def _contents(location: Path, form: Form, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """(name, content) of the files with these names, given without ending."""
    file_names = [name + form.ending for name in names]
    if location.is_dir():
        files = (location / name for name in file_names)
        contents = {file.name: file.read_bytes() for file in files if file.is_file()}
    else:
        contents = {}
        try:
            with tarfile.open(location, "r:" if location.suffix == ".tar" else "r:gz") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if member.isfile() and name in file_names:
                        contents[name] = archive.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{location} cannot be read ({error}); download it again") from error
    for name in file_names:
        if name not in contents:
            raise FileNotFoundError(f"{location} has no {name}; download CIFAR-10 again")
    return [(name, contents[name]) for name in file_names]


def _check(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both; ValueError unless they are COUNT images with labels of CLASSES."""
    if rows.dtype != np.uint8 or rows.shape != (COUNT, ROW):
        raise ValueError(f"images are {rows.dtype} {rows.shape}, not uint8 {(COUNT, ROW)}")
    if labels.shape != (COUNT,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, not {COUNT} integers")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, not 0 to 9")
    return rows, labels
