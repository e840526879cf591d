"""Errors of bad input: one line that names the field or file and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
    """Bad input of a user, as one line "FIELD: REASON".

    field: a dotted field of the configuration, a flag or a path. reason: what is wrong with its
    value, and what to do.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)  # both are arguments, so that it can be pickled
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def config_errors(field: str) -> Iterator[None]:
    """Convert errors while reading the file of a field into a ConfigError of that field."""
    try:
        yield
    except ConfigError:  # it names a field already
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(field, one_line(error)) from error
