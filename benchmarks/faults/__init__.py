"""Faults that the tests must find, see ../mutations.py: each changes one line of a formula."""

from benchmarks.faults import formulas, models, runs
from benchmarks.faults.base import Fault

__all__ = ["FAULTS", "Fault"]

FAULTS = (*formulas.FAULTS, *models.FAULTS, *runs.FAULTS)
