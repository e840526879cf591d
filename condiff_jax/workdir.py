"""Names and text files of a work directory; local or remote (gs://) through etils.epath."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Container
from typing import Any

import jax
import numpy as np
from etils import epath

from condiff_jax import config as config_lib
from condiff_jax.config import Config, ConfigError
from condiff_jax.convert import weights
from condiff_jax.system import System, Vocabulary


class Workdir:
    """A run's folder: config.json, vocabulary.json, checkpoints/, metrics.jsonl, samples/.

    encoders.json: of each frozen encoder the sha256 of the files it comes from.
    control.npy (M, 8) f32: the control metadata of the first training images, in the order of
    `SCALARS`, from which sampling.size=train draws.
    """

    def __init__(self, path: str):
        self.path = epath.Path(path)
        self.config = self.path / "config.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.encoders = self.path / "encoders.json"
        self.control = self.path / "control.npy"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluation = self.path / "evaluation.jsonl"
        self.samples = self.path / "samples"

    def open(self, config: Config, vocabulary: Vocabulary) -> None:
        """Create the folder, or check that it belongs to this config and data; ConfigError else."""
        if self.config.exists():
            self.check(config)
            if self.load_vocabulary() != vocabulary:
                raise ConfigError(
                    f"{self.vocabulary}: the data set's words or classes have changed since this "
                    "run began; use another --workdir"
                )
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            write(self.config, config.to_json())
            write(self.vocabulary, vocabulary.to_json())

    def check(self, config: Config) -> None:
        """ConfigError when the run in this folder differs in more than how it is run or sampled."""
        if not self.config.exists():
            raise ConfigError(f"{self.path}: no run here (no config.json); train one first")
        old = config_lib.create(json.loads(self.config.read_text()))
        found = config_lib.differences(old, config)
        if found:
            more = f" (and {len(found) - 1} more fields)" if len(found) > 1 else ""
            raise ConfigError(
                f"{self.path}: its checkpoints belong to another config: {found[0]}{more}; "
                "use another --workdir or restore the field"
            )

    def save_control(self, control: np.ndarray) -> None:
        """Keep the control metadata (M, 8) of training images."""
        if jax.process_index() == 0:
            with io.BytesIO() as buffer:
                np.save(buffer, control, allow_pickle=False)
                write(self.control, buffer.getvalue())

    def load_control(self) -> np.ndarray | None:
        """What `save_control` kept, None if it did not (an import)."""
        if not self.control.exists():
            return None
        return np.load(io.BytesIO(self.control.read_bytes()), allow_pickle=False)

    def load_frozen(self, system: System, without: Container[str] = ()) -> dict:
        """`System.load_frozen`; ConfigError unless from the files that this run began with.

        without: networks to leave out.
        """
        parts = {name: part for name, part in system.frozen.items() if name not in without}
        known = json.loads(self.encoders.read_text()) if self.encoders.exists() else {}
        found = {name: weights.sha256(part.files()) for name, part in parts.items()}
        for name, digest in found.items():
            if known.get(name, digest) != digest:
                raise ConfigError(
                    f"{name}.path: the files in {config_lib.get(system.config, f'{name}.path')} "
                    f"are others than this run began with (sha256 {digest[:12]}, but "
                    f"{known[name][:12]} in {self.encoders}); name those, or use another --workdir"
                )
        loaded = {name: part.load() for name, part in parts.items()}
        if found.keys() - known.keys() and jax.process_index() == 0:
            write(self.encoders, json.dumps(known | found, indent=2) + "\n")
        return loaded

    def load_vocabulary(self) -> Vocabulary:
        """The words and classes of the run in this folder."""
        return Vocabulary.from_json(self.vocabulary.read_text())


def write(path: epath.Path, content: str | bytes) -> None:
    """Replace a file in one step: readers see the old or the new one, never a part."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def append_json(path: epath.Path, value: dict[str, Any]) -> None:
    """Add one line of JSON to a file; remote stores cannot append, there it is rewritten."""
    line = json.dumps(value) + "\n"
    if "://" in os.fspath(path):
        path.write_text((path.read_text() if path.exists() else "") + line)
    else:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)


def forget_after(path: epath.Path, step: int) -> None:
    """Drop the lines of a JSON-lines file beyond `step`: a resumed run writes them again."""
    if path.exists():
        lines = path.read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        if len(kept) != len(lines):
            write(path, "".join(line + "\n" for line in kept))
