"""The command line of modes sweep and report in the process of the test."""

from absl.testing import flagsaver

from condiff_jax import main


def sweep(*arguments) -> int:
    """Exit code of mode sweep."""
    return run("--mode=sweep", *arguments)


def report(*arguments) -> int:
    """Exit code of mode report."""
    return run("--mode=report", *arguments)


def run(*arguments) -> int:
    """Exit code of `python -m condiff_jax.main ARGUMENTS`."""
    with flagsaver.flagsaver():
        try:
            return main.main(main.parse(["condiff_jax", *map(str, arguments)])) or 0
        except SystemExit as end:
            return end.code
