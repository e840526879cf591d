"""Bad input: one line that names the field or file and the fix."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class ConfigError(ValueError):
    """Bad input of a user: "FIELD: REASON" in one line.

    field: a dotted field of the configuration, a flag or a path. reason: what is wrong with its
    value, and what to do.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)  # as arguments: processes pickle it
        self.field, self.reason = field, reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"


def one_line(error: BaseException | str) -> str:
    """A message without line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def config_errors(field: str) -> Iterator[None]:
    """Turn errors in reading what a field names into a ConfigError of that field."""
    try:
        yield
    except ConfigError:  # it names a field already
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(field, one_line(error)) from error
