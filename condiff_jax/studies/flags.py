"""Flags of modes sweep and report; nothing here loads JAX, so a bad flag is reported at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from absl import flags

TABLE = (flags.DEFINE_string, "config", "", "Table: a config file with ROWS, configs/table3.py.")
FLAGS = {
    "sweep": (
        TABLE,
        (flags.DEFINE_string, "scale", "", "paper (default), small or tiny."),
        (flags.DEFINE_multi_string, "rows", [], "Patterns of rows, separated by ';' or repeated."),
        (flags.DEFINE_list, "seeds", [], "Such as 0,1; the config's seed by default."),
        (flags.DEFINE_string, "shard", "", "I/N: every N-th group of runs, from the I-th."),
        (flags.DEFINE_bool, "dry_run", False, "List the runs, and check their configs."),
    ),
    "report": (
        TABLE,
        (flags.DEFINE_list, "results", [], "Work directories of sweeps, .jsonl, saved .json."),
        (flags.DEFINE_string, "html", "", "HTML file to write, with figures and images."),
        (flags.DEFINE_string, "markdown", "", "Markdown file to write."),
        (flags.DEFINE_string, "save", "", "File to record the results in that are shown."),
    ),
}
OVERRIDE = re.compile(r"--config\.([\w.]+)=(.*)", re.DOTALL)


def parse(mode: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a mode's `run`; flags.Error for bad flags.

    overrides: text by field of --config.FIELD=VALUE. The table's own config need not have the
    field, such as one of an earlier stage that only some rows have.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    for define, name, default, meaning in FLAGS[mode]:
        define(name, default, meaning, flag_values=values)
    rest = values([mode, *arguments], known_only=True)[1:]
    parsed, overrides = values.flag_values_dict(), {}
    for argument in rest:
        match = OVERRIDE.fullmatch(argument)
        if mode != "sweep" or not match:
            known = ", ".join(f"--{name}" for name in parsed)
            raise flags.Error(f"unexpected argument {argument!r}; mode {mode} has {known}")
        overrides[match[1]] = match[2]
    parsed["table"] = parsed.pop("config")
    return parsed | ({"overrides": overrides} if mode == "sweep" else {})
