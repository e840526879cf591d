"""Random access to TFDS data sets in array_record format, without TensorFlow."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from condiff_jax.data.images import Encoded
from condiff_jax.data.records import Records, Shards, by_frequency, count_words

INFO = "dataset_info.json"  # written last, so it marks a complete data set
BEGUN = ".prepare"  # work folder of mode prepare until the data set is complete
# Features that are read, and their field in a tf.train.Example.
FEATURES = {"image": "bytes_list", "caption": "bytes_list"}
FEATURES |= dict.fromkeys(("label", "height", "width"), "int64_list")
SPLITS = {"train": ("train",), "validation": ("validation", "test")}  # names in TFDS


def words_file(split: str) -> str:
    """File name of a split's words, most frequent first, as written by mode prepare."""
    return f"words-{split}.txt"


class TFDS(Records):
    """One split of a data set written by mode prepare or by TFDS.

    The feature image is required. Features label, caption, and height and width of the original are
    optional; others are not read. Without a feature caption, the class name is the caption. Without
    a validation split, TFDS's "test" is used as such.
    """

    def __init__(self, path, split: str = "train"):
        """Read the metadata; ValueError or FileNotFoundError if it cannot be read."""
        self.path = Path(path).expanduser()
        builder = open_builder(self.path)
        self.split = find_split(self.path, tuple(builder.info.splits), split)
        features = builder.info.features
        if "image" not in features:
            raise ValueError(f"{self.path} has no feature image, only {', '.join(features)}")
        self._features = {name: kind for name, kind in FEATURES.items() if name in features}
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
        # TFDS's parser handles any features, but takes several times as long in Python.
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
        """As `Records.vocabulary`; reads no records if mode prepare has counted the words."""
        file = self.path / words_file(self.split)
        if file.exists():
            return tuple(file.read_text(encoding="utf-8").split()[:max_words])
        if "caption" not in self._features:
            names = self.classes if "label" in self._features else ()
            return tuple(by_frequency(count_words(names))[:max_words])
        return super().vocabulary(max_words)


def open_builder(path: Path):
    """Open a folder with TFDS's read-only builder; ValueError or FileNotFoundError if bad."""
    import tensorflow_datasets as tfds

    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; mode prepare makes it")
    if not (path / INFO).exists():
        if (path / BEGUN).exists():
            raise ValueError(f"{path} is not finished; run mode prepare again")
        nested = sorted(path.glob(f"*/{INFO}")) + sorted(path.glob(f"*/*/{INFO}"))
        hint = f"; give {nested[0].parent}" if nested else ""
        raise ValueError(f"{path} holds no TFDS data set (no {INFO}){hint}")
    check_features(path / "features.json")
    try:
        builder = tfds.builder_from_directory(path)
        formats = {form.value for form in builder.info.available_file_formats()}
    except Exception as error:  # TFDS does not wrap the errors of its parsers
        raise ValueError(
            f"{path}: its metadata cannot be read ({error}); copy or prepare it again"
        ) from error
    if "array_record" not in formats:
        raise ValueError(
            f"{path} has the format {', '.join(sorted(formats))}; convert it to array_record with: "
            f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record "
            "--out_dir=NEW (needs TensorFlow)"
        )
    if builder.info.file_format.value != "array_record":
        builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def check_features(file: Path) -> None:
    """Raise ValueError if a features.json names a class that is not TFDS's own.

    TFDS imports the module of every class named in the file, so a folder could run any code.
    """
    try:
        names = list(class_names(json.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    for name in names:
        # All features of TFDS's own data sets, including old ones, are in this package.
        if not re.fullmatch(r"tensorflow_datasets\.core\.features(\.\w+)+", name, re.ASCII):
            raise ValueError(
                f"{file} names {name}, which is not in tensorflow_datasets.core.features; reading "
                "this data set would run foreign code"
            )


def class_names(value) -> Iterator[str]:
    """Iterate over the feature classes, at any depth, that TFDS would import for parsed JSON."""
    if isinstance(value, dict):
        for key, inner in value.items():
            # Old files use "type"; the others are the two JSON spellings of a protobuf field.
            if key in ("pythonClassName", "python_class_name", "type") and isinstance(inner, str):
                yield inner
            else:
                yield from class_names(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from class_names(inner)
    elif isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        # TFDS also parses features that are given as a JSON string; most strings are not JSON.
        with contextlib.suppress(json.JSONDecodeError):
            yield from class_names(json.loads(value))


def find_split(path: Path, available: tuple[str, ...], split: str) -> str:
    """Return the data set's own name of a split; ValueError if it has none."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    for name in SPLITS[split]:
        if name in available:
            return name
    raise ValueError(f"{path} has no split {split}, only {', '.join(available) or 'none'}")
