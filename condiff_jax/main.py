"""Command line: python -m condiff_jax.main --config=configs/X.py[:key=value] --workdir=DIR."""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from condiff_jax import config as config_lib
from condiff_jax import sample, summary, train
from condiff_jax.config import ConfigError

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, and its arguments.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; rerunning resumes.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "summary"], "What to do.")


def main(_) -> None:
    """Dispatch to the mode; bad input ends with one line and exit code 2."""
    try:
        if CONFIG.value is None:
            raise ConfigError("--config is missing, e.g. --config=configs/quickstart.py")
        config = config_lib.create(CONFIG.value)
        if MODE.value == "summary":
            return summary.run(config)
        if not WORKDIR.value:
            raise ConfigError(f"--workdir is missing; mode {MODE.value} needs the run's folder")
        run = {"train": train.run, "sample": sample.run}[MODE.value]
        run(config, WORKDIR.value)
    except (ConfigError, FloatingPointError) as error:
        fail(error)


def fail(error: Exception) -> None:
    """Print an error in one line and exit with code 2."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parsing, with errors of config files and overrides in one line."""
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
        return rest
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse)
