"""Random access to data sets as TFDS writes them (array_record), without TensorFlow."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from condiff_jax.data.images import Encoded
from condiff_jax.data.records import Records, Shards, by_frequency, count_words

INFO = "dataset_info.json"  # written last: with it a data set is whole
BEGUN = ".prepare"  # what mode prepare keeps until then
# Features that are read, and where a tf.train.Example has them.
FEATURES = {"image": "bytes_list", "caption": "bytes_list"}
FEATURES |= dict.fromkeys(("label", "height", "width"), "int64_list")
SPLITS = {"train": ("train",), "validation": ("validation", "test")}  # names in TFDS


def words_file(split: str) -> str:
    """The file with a split's words, most frequent first, that mode prepare leaves."""
    return f"words-{split}.txt"


class TFDS(Records):
    """One split of a folder that mode prepare or TFDS has made.

    It must have the feature image, and may have label, caption, and the original's height and
    width; other features are not read. Where no feature is called caption, the class's name is the
    caption. TFDS's "test" is the validation split of a data set without one.
    """

    def __init__(self, path, split: str = "train"):
        """Reads the metadata; ValueError or FileNotFoundError for what cannot be read."""
        self.path = Path(path).expanduser()
        builder = open_builder(self.path)
        self.split = find_split(self.path, tuple(builder.info.splits), split)
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"{self.path} has no feature image, only {', '.join(features)}")
        self._features = {name: at for name, at in FEATURES.items() if name in features}
        instructions = builder.info.splits[self.split].file_instructions
        counts = [instruction.examples_in_shard for instruction in instructions]
        self._shards = [instruction.filename for instruction in instructions]
        self._records = Shards(self._shards, counts)
        if not len(self._records):
            raise ValueError(f"{self.path} has no {self.split} samples")
        label = dict(features).get("label")
        self.classes = tuple(getattr(label, "names", None) or ("0",))
        super().__init__()

    def __len__(self):
        return len(self._records)

    def _read(self, i: int) -> dict:
        from tensorflow_datasets.proto import tf_example_pb2

        shard, position = self._records.find(i)
        (data,) = shard.read([position])
        # TFDS's parser, for any features, would take several times as long in Python.
        values = tf_example_pb2.Example.FromString(data).features.feature
        return {name: getattr(values[name], kind).value[0] for name, kind in self._features.items()}

    def _record(self, i: int) -> dict:
        record = self._read(i)
        image = Encoded(record["image"])
        size = tuple(int(record.get(name, 0)) for name in ("height", "width"))
        original = {"size": size} if min(size) > 0 and size != (image.height, image.width) else {}
        label = np.int32(record.get("label", 0))
        return {"image": image, "caption": self._text(record), "label": label, **original}

    def _where(self, i: int) -> str:
        return f"{i} of {self.path} ({self.split})"

    def _caption(self, i: int) -> str:
        return self._text(self._read(i))

    def _text(self, record: dict) -> str:
        if "caption" in record:
            return record["caption"].decode("utf-8", errors="replace")
        return self.classes[record["label"]] if "label" in record else ""

    def vocabulary(self, max_words: int = 8192) -> tuple[str, ...]:
        """As of `Records`; without reading records where mode prepare has counted the words."""
        counted = self.path / words_file(self.split)
        if counted.exists():
            return tuple(counted.read_text(encoding="utf-8").split()[:max_words])
        if "caption" not in self._features:
            return tuple(by_frequency(count_words(self._names()))[:max_words])
        return super().vocabulary(max_words)

    def _names(self) -> Iterator[str]:
        return iter(self.classes if "label" in self._features else ())


def open_builder(path: Path):
    """TFDS's read-only builder of a folder; ValueError or FileNotFoundError says what is wrong."""
    import tensorflow_datasets as tfds

    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; mode prepare makes it")
    if not (path / INFO).exists():
        if (path / BEGUN).exists():
            raise ValueError(f"{path} is not finished; run mode prepare again")
        below = sorted(path.glob(f"*/{INFO}")) + sorted(path.glob(f"*/*/{INFO}"))
        hint = f"; give {below[0].parent}" if below else ""
        raise ValueError(f"{path} holds no TFDS data set (no {INFO}){hint}")
    check_features(path / "features.json")
    try:
        builder = tfds.builder_from_directory(path)
        formats = {form.value for form in builder.info.available_file_formats()}
    except Exception as error:  # TFDS lets pass what JSON and its parsers raise
        raise ValueError(f"{path}: its metadata cannot be read ({error})") from error
    if "array_record" not in formats:
        raise ValueError(
            f"{path} is in the form {', '.join(sorted(formats))}; make array_record of it with: "
            f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record "
            "--out_dir=NEW (needs TensorFlow)"
        )
    if builder.info.file_format.value != "array_record":
        builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def check_features(file: Path) -> None:
    """ValueError where a features.json names a class that is not TFDS's own.

    TFDS imports the module of every class that the file names: a folder could run any code.
    """
    try:
        names = list(class_names(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    for name in names:
        # Where all features of TFDS's own data sets are, also of old ones.
        if not re.fullmatch(r"tensorflow_datasets\.core\.features(\.\w+)+", name, re.ASCII):
            raise ValueError(
                f"{file} names {name}, which is not of tensorflow_datasets.core.features: reading "
                "this data set would run foreign code"
            )


def class_names(value) -> Iterator[str]:
    """The classes of features, however deep, that TFDS would import for parsed JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # "type": as old files have it; the others are both spellings of a protobuf's field.
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str):
                yield inner
            else:
                yield from class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from class_names(inner)
    elif isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        with contextlib.suppress(json.JSONDecodeError):  # a description, say
            yield from class_names(json.loads(value))  # features as a text, which TFDS parses


def find_split(path: Path, available: tuple[str, ...], split: str) -> str:
    """The name under which the data set has a split; ValueError if it has none."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    for name in SPLITS[split]:
        if name in available:
            return name
    raise ValueError(f"{path} has no split {split}, only {', '.join(available) or 'none'}")
