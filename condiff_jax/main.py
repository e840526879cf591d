"""Command line: python -m condiff_jax.main --config=configs/X.py[:key=value] --workdir=DIR."""

from __future__ import annotations

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from condiff_jax.runtime.process import compile_only, fail, stoppable, use_huge_pages

CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, and its arguments.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; rerunning resumes.")
MODE = flags.DEFINE_enum("mode", "train", ["train", "sample", "evaluate", "reference", "summary",
    "plan", "prepare", "encode", "import", "export"], "What to do.")  # fmt: skip
TOPOLOGY = flags.DEFINE_string("topology", None, "Mode plan: such as v5e:8x8, or several with ','.")
TIMES = flags.DEFINE_bool("times", True, "Mode plan: estimate times, too; they take the longest.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0 of several.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many; TPU VMs, Slurm, Open MPI tell.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")


def main(_) -> None:
    """Meet other processes, then the mode; bad input ends with one line and exit code 2."""
    if MODE.value == "plan":
        compile_only()
    # Imported here so that bad flags are reported at once, not after loading JAX.
    from condiff_jax.config.errors import ConfigError
    from condiff_jax.objectives.validate import create_config
    from condiff_jax.runtime.distributed import abort_on_error, initialize, is_multiprocess

    if MODE.value not in ("plan", "summary"):  # which use no device
        initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
    with stoppable(agreed=MODE.value == "train" and is_multiprocess()), abort_on_error():
        try:
            dispatch(create_config(CONFIG.value), MODE.value, WORKDIR.value)
        except (ConfigError, FloatingPointError) as error:
            sys.exit(fail(error))


def dispatch(config, mode: str, workdir: str | None) -> None:
    """Run a mode; ConfigError for bad input."""
    from condiff_jax.config.errors import ConfigError
    from condiff_jax.data.builders import prepare
    from condiff_jax.evaluation import evaluate, image_quality
    from condiff_jax.objectives import summary
    from condiff_jax.planning import plan
    from condiff_jax.pytorch import exporting, importing
    from condiff_jax.sampling import sample
    from condiff_jax.training import encode, loop

    without = {"prepare": prepare.run, "encode": encode.run}  # a workdir
    without |= {
        "reference": image_quality.run_reference,
        "summary": lambda c: summary.run(c, workdir),
    }
    without |= {"plan": lambda c: plan.run(c, TOPOLOGY.value, times=TIMES.value)}
    if mode in without:
        return without[mode](config)
    if not workdir:
        raise ConfigError("--workdir", f"missing; mode {mode} needs it")
    chosen = config_flags.get_override_values(flags.FLAGS["config"])
    modes = {"train": loop.run, "sample": sample.run, "evaluate": evaluate.run}
    modes |= {"export": exporting.run, "import": lambda *args: importing.run(*args, chosen)}
    modes[mode](config, workdir)


def parse(argv: list[str]) -> list[str]:
    """absl's flag parsing and the loading of the config file, with errors in one line."""
    try:
        rest = flags.FLAGS(argv)
        if rest[1:]:
            raise flags.Error(f"unexpected argument {rest[1]!r}")
        if CONFIG.value is None:
            raise flags.Error("--config is missing, try --config=configs/quickstart.py")
        CONFIG.value.keys()  # a file that failed to load says so on first use
        return rest
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
