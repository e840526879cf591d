"""A fault, and lists of them."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    """`text`, which is in `file` exactly once, becomes `replacement`; `tests` are to fail then.

    equivalent: why none can, if nothing that is computed depends on it.
    """

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]
    equivalent: str = ""


def of(file: str, tests: str, *rows: tuple[str, str, str, str]) -> list[Fault]:
    """Faults of a file below condiff_jax/ from rows (name, test, text, replacement).

    tests: the file of the tests, below tests/.
    """
    return [
        Fault(name, f"condiff_jax/{file}", text, replacement, (f"tests/{tests}::{test}",))
        for name, test, text, replacement in rows
    ]
