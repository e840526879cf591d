"""Vocabulary of a data set: words and classes."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from pathlib import Path

from condiff_jax.config.errors import ConfigError
from condiff_jax.config.schema import Config
from condiff_jax.data.pipeline import open_source
from condiff_jax.models.text_encoder import word_tokenizer


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Words and classes of a data set, stored in the work directory as vocabulary.json."""

    words: tuple[str, ...]
    classes: tuple[str, ...]

    def to_json(self) -> str:
        """Serialize to the text of vocabulary.json."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """Parse vocabulary.json; the inverse of `to_json`."""
        return cls(**{key: tuple(value) for key, value in json.loads(text).items()})

    @cached_property
    def tokenizer(self):
        """Word-level tokenizer over `words`."""
        return word_tokenizer(self.words)


def create_vocabulary(config: Config, source) -> Vocabulary:
    """Collect the words and classes of a data source that the config uses."""
    if config.objective == "reconstruction":
        return Vocabulary((), ())
    if config.data.semantics == "class":
        count = len(source.classes)
        expected = config.data.classes
        if expected and count != expected:
            raise ConfigError("data.classes", f"is {expected}, but the data has {count} classes")
        return Vocabulary((), tuple(source.classes))
    words = () if config.text_encoder.name == "clip" else source.vocabulary()
    return Vocabulary(tuple(words), ())


def is_absent(path: str) -> bool:
    """Whether a local path is not on this machine."""
    return "://" not in path and not Path(path).exists()


def load_vocabulary(config: Config) -> Vocabulary:
    """Load the vocabulary of the data; if the data is absent, `data.classes` numbered classes."""
    path = config.data.path
    if (path and not is_absent(path)) or config.data.name == "shapes":
        return create_vocabulary(config, open_source(config))
    return Vocabulary((), tuple(map(str, range(config.data.classes))))
