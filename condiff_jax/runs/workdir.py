"""Work directory of a run: file names, config, vocabulary; local or remote through etils.epath."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from collections.abc import Container, Iterator

import jax
import numpy as np
from etils import epath

from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.config.identity import differences
from condiff_jax.config.schema import Config
from condiff_jax.objectives.base import Objective
from condiff_jax.objectives.validate import create_config
from condiff_jax.objectives.vocabulary import Vocabulary
from condiff_jax.pretrained import weights
from condiff_jax.runtime.files import write_file


class Workdir:
    """Folder of a run: config.json, vocabulary.json, checkpoints/, metrics.jsonl, samples/.

    encoders.json: the sha256 of the weight files of each frozen encoder.
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

    def grid(self, step: int) -> epath.Path:
        """Path of the sample grid of a step."""
        return self.samples / f"{step}.png"

    def open(self, config: Config, vocabulary: Vocabulary, *, begun: bool = False) -> None:
        """Create the folder, or raise ConfigError if it belongs to another config or data set.

        begun: whether there is a checkpoint; without one the folder's files are replaced.
        """
        if begun:
            self.check(config)
            if self.load_vocabulary() != vocabulary:
                raise ConfigError(
                    str(self.vocabulary),
                    "the data set's words or classes have changed since this run began; use "
                    "another --workdir",
                )
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            if not begun:
                self.encoders.unlink(missing_ok=True)
            write_file(self.vocabulary, vocabulary.to_json())
            write_file(self.config, config.to_json())

    def load_config(self) -> Config:
        """Load the config of this run; ConfigError where there is none.

        A field that is newer than the run gets its default.
        """
        if not self.config.exists():
            raise ConfigError(str(self.path), "no run here (no config.json); train one first")
        try:
            return create_config(json.loads(self.config.read_text()))
        except ValueError as error:
            raise ConfigError(
                str(self.config),
                f"damaged, or of another version of condiff_jax: {error}",
            ) from error

    def check(self, config: Config) -> None:
        """Raise ConfigError if the run differs in fields other than how it is run or sampled."""
        changes = differences(self.load_config(), config)
        if changes:
            more = f" (and {len(changes) - 1} more fields)" if len(changes) > 1 else ""
            raise ConfigError(
                str(self.path),
                f"its checkpoints belong to another config: {changes[0]}{more}; use another "
                "--workdir or restore the field",
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder against training by other processes; ConfigError if it is locked.

        The lock ends with the process, even a killed one. Remote folders have no lock.
        """
        if jax.process_index() or "://" in os.fspath(self.path):
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ConfigError(
                    str(self.path),
                    "another process trains here; wait for it or use another folder",
                ) from None
            yield

    def save_control(self, control: np.ndarray) -> None:
        """Save the control metadata (M, 8) of training images."""
        if jax.process_index() == 0:
            with io.BytesIO() as buffer:
                np.save(buffer, control, allow_pickle=False)
                write_file(self.control, buffer.getvalue())

    def load_control(self) -> np.ndarray | None:
        """Load the control metadata; None where there is none (an imported model)."""
        if not self.control.exists():
            return None
        return np.load(io.BytesIO(self.control.read_bytes()), allow_pickle=False)

    def load_frozen(self, objective: Objective, without: Container[str] = ()) -> dict:
        """Load the frozen networks of an objective; ConfigError if their files have changed.

        The files must be those with which this run began. without: networks to leave out.
        """
        networks = {name: part for name, part in objective.frozen.items() if name not in without}
        recorded = json.loads(self.encoders.read_text()) if self.encoders.exists() else {}
        digests = {name: weights.sha256(network.files()) for name, network in networks.items()}
        for name, digest in digests.items():
            if recorded.get(name, digest) != digest:
                field = networks[name].field
                raise ConfigError(
                    field,
                    f"the files in {get(objective.config, field)} are not those that this run "
                    f"began with (sha256 {digest[:12]}, but {recorded[name][:12]} in "
                    f"{self.encoders}); name those, or use another --workdir",
                )
        loaded = {name: network.load() for name, network in networks.items()}
        if digests.keys() - recorded.keys() and jax.process_index() == 0:
            write_file(self.encoders, json.dumps(recorded | digests, indent=2) + "\n")
        return loaded

    def load_vocabulary(self) -> Vocabulary:
        """Load the words and classes of this run."""
        return Vocabulary.from_json(self.vocabulary.read_text())
