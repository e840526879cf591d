"""CIFAR-10 from its official archives: the pickled one of Python, and the binary one."""

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
ROW = 3 * SIDE**2  # bytes of a picture: its red, green and blue planes
COUNT = 10_000  # pictures of a file
SPLITS = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "validation": ("test_batch",)}


class _Arrays(pickle.Unpickler):
    """Builds containers, numbers, strings and numpy arrays; whatever else a pickle names fails."""

    # By the names of numpy 1, of which the archive's pickles are, and of numpy 2.
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    allowed |= dict.fromkeys(
        [("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")],
        np.empty(0).__reduce__()[0],
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return self.allowed[module, name]


def _read_pickled(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    values = _Arrays(io.BytesIO(content), encoding="bytes").load()
    return np.asarray(values[b"data"]), np.asarray(values[b"labels"])


def _read_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
    rows = np.frombuffer(content, np.uint8)
    if len(rows) % (1 + ROW):
        raise ValueError(f"its {len(rows)} bytes are no multiple of {1 + ROW}")
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
    """A split as records of image uint8 (32, 32, 3), the class's name as caption, and label.

    path: one of the archives, the folder that it unpacks to, or a folder with either. The split
    is held in memory. ValueError or FileNotFoundError for what is no CIFAR-10.
    """

    classes = CLASSES

    def __init__(self, path, split: str = "train"):
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
        self.path, self.split = Path(path).expanduser(), split
        self._load()

    def _load(self) -> None:
        place, form = _find(self.path)
        parts = []
        for name, content in _contents(place, form, SPLITS[self.split]):
            try:
                parts.append(_check(*form.read(content)))
            except Exception as error:  # a damaged pickle makes nearly anything be raised
                reason = " ".join(str(error).split()) or type(error).__name__
                raise ValueError(
                    f"{place}: {name} is no batch of CIFAR-10 ({reason}); get the archive again"
                ) from error
        rows, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        self._images = rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
        self._labels = labels.astype(np.int32)

    def __getstate__(self):  # other processes read the files themselves
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
        """The words of the classes' names."""
        return tuple(by_frequency(count_words(CLASSES)))


def _find(path: Path) -> tuple[Path, Form]:
    """The folder or archive at or in a path, and its form."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give CIFAR-10's folder or archive")
    for form in FORMS:
        if path.is_file() and path.name.endswith((".tar.gz", ".tgz", ".tar")):
            if ("bin" in path.name) == (form.ending == ".bin"):
                return path, form
            continue
        first = SPLITS["train"][0] + form.ending
        for place in (path, path / form.folder):
            if (place / first).is_file():
                return place, form
        if (path / form.archive).is_file():
            return path / form.archive, form
    wanted = " or ".join(f"{form.folder} or {form.archive}" for form in FORMS)
    raise ValueError(f"{path} is no CIFAR-10; give {wanted}, or the folder with it")


def _contents(place: Path, form: Form, names: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """(name, content) of the files with these names, without endings."""
    wanted = [name + form.ending for name in names]
    if place.is_dir():
        found = {name: (place / name).read_bytes() for name in wanted if (place / name).is_file()}
    else:
        found = {}
        try:
            with tarfile.open(place, "r:" if place.suffix == ".tar" else "r:gz") as archive:
                for member in archive:
                    name = Path(member.name).name
                    if member.isfile() and name in wanted:
                        found[name] = archive.extractfile(member).read()
        except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{place} cannot be read ({error}); get it again") from error
    for name in wanted:
        if name not in found:
            raise FileNotFoundError(f"{place} has no {name}; get CIFAR-10 again")
    return [(name, found[name]) for name in wanted]


def _check(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both; ValueError unless they are COUNT pictures with labels of CLASSES."""
    if rows.dtype != np.uint8 or rows.shape != (COUNT, ROW):
        raise ValueError(f"pictures are {rows.dtype} {rows.shape}, not uint8 {(COUNT, ROW)}")
    if labels.shape != (COUNT,) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {labels.shape}, not {COUNT} whole numbers")
    if labels.min() < 0 or labels.max() >= len(CLASSES):
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, not 0 to 9")
    return rows, labels
