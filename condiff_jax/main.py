"""Command line: python -m condiff_jax.main --mode=MODE --config=configs/X.py --workdir=DIR."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from condiff_jax.config.errors import ConfigError
from condiff_jax.runtime.process import compile_only, fail, stoppable, use_huge_pages
from condiff_jax.studies import flags as studies

MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "evaluate", "reference", "summary",
    "plan", "prepare", "encode", "import", "export", *studies.FLAGS], "What to do.")  # fmt: skip
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; rerunning resumes.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Mode plan: v5e:8x8, or several, by commas.")
TIMES = flags.DEFINE_bool("times", True, "Mode plan: estimate times, which takes longest.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, with several.")
PROCESSES = flags.DEFINE_integer("processes", None, "Number; automatic on TPU VMs, Slurm, MPI.")
PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.")
CONFIG_FLAGS = flags.FlagValues()  # parsed after the flags above: studies load their tables
CONFIG = config_flags.DEFINE_config_file("config", None, flag_values=CONFIG_FLAGS)


def main(study: dict[str, Any]) -> int | None:
    """Initialize distributed JAX, then run the mode; bad input is one line and exit code 2."""
    if MODE.value in ("plan", "report"):
        compile_only()
    # Imported here so that bad flags are reported before JAX is loaded.
    from condiff_jax.runtime.distributed import abort_on_error, initialize, is_multiprocess

    if MODE.value not in ("plan", "summary", "report"):  # these use no device
        initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    with (
        stoppable(coordinated=MODE.value in ("train", "sweep") and is_multiprocess()),
        abort_on_error(),
    ):
        try:
            return dispatch(MODE.value, WORKDIR.value, study)
        except (ConfigError, FloatingPointError) as error:
            sys.exit(fail(error))


def dispatch(mode: str, workdir: str | None, study: dict[str, Any]) -> int | None:
    """Run a mode and return its exit code, None for 0; ConfigError for bad input."""
    if mode in studies.FLAGS:  # only mode report loads matplotlib
        return importlib.import_module(f"condiff_jax.studies.{mode}").run(workdir, **study)
    from condiff_jax.data.builders import prepare
    from condiff_jax.evaluation import evaluate, image_quality
    from condiff_jax.objectives import summary
    from condiff_jax.objectives.validate import create_config
    from condiff_jax.planning import plan
    from condiff_jax.pytorch import exporting, importing
    from condiff_jax.sampling import sample
    from condiff_jax.training import encode, loop

    config = create_config(CONFIG.value)
    if not workdir and mode in ("train", "sample", "evaluate", "import", "export"):
        raise ConfigError("--workdir", f"missing; mode {mode} needs it")
    overrides = config_flags.get_override_values(CONFIG_FLAGS["config"])
    modes = {
        "train": lambda: loop.run(config, workdir), "sample": lambda: sample.run(config, workdir),
        "evaluate": lambda: evaluate.run(config, workdir), "encode": lambda: encode.run(config),
        "summary": lambda: summary.run(config, workdir), "prepare": lambda: prepare.run(config),
        "reference": lambda: image_quality.run_reference(config),
        "plan": lambda: plan.run(config, TOPOLOGY.value, times=TIMES.value),
        "import": lambda: importing.run(config, workdir, overrides),
        "export": lambda: exporting.run(config, workdir),
    }  # fmt: skip
    modes[mode]()


def parse(argv: list[str]) -> dict[str, Any]:
    """Parse the flags and load the config, with one-line errors; return a study's arguments."""
    try:
        flags.FLAGS.set_gnu_getopt()  # config flags may precede the others
        rest = flags.FLAGS(argv, known_only=True)
        if MODE.value in studies.FLAGS:
            return studies.parse(MODE.value, rest[1:])
        if unexpected := CONFIG_FLAGS(rest)[1:]:
            raise flags.Error(f"unexpected argument {unexpected[0]!r}")
        if CONFIG.value is None:
            raise flags.Error("--config is missing, try --config=configs/quickstart.py")
        CONFIG.value.keys()  # raises the error of a file that failed to load
        return {}
    except (KeyError, AttributeError) as error:
        message = f"--config: unknown field {error.args[0]}; condiff_jax/config/schema.py lists all"
    except (flags.Error, TypeError, ValueError, OSError) as error:
        # ml_collections appends the traceback of a failing config file; its last line says why.
        message = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
    sys.exit(fail(ValueError(message)))


if __name__ == "__main__":
    use_huge_pages()
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=parse)
