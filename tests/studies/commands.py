"""The command line of modes sweep and report, run within the test process."""

from absl.testing import flagsaver

from condiff_jax import main


def sweep(*arguments) -> int:
    """Run mode sweep and return its exit code."""
    return run("--mode=sweep", *arguments)


def report(*arguments) -> int:
    """Run mode report and return its exit code."""
    return run("--mode=report", *arguments)


def run(*arguments) -> int:
    """Run the command line `python -m condiff_jax.main ARGUMENTS` and return its exit code."""
    with flagsaver.flagsaver():
        try:
            return main.main(main.parse(["condiff_jax", *map(str, arguments)])) or 0
        except SystemExit as end:
            return end.code
