"""Flags of modes sweep and report; without JAX, so that bad flags are reported at once."""

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
        (flags.DEFINE_list, "seeds", [], "Such as 0,1; default: the config's seed."),
        (flags.DEFINE_string, "shard", "", "I/N: every N-th group of runs, from the I-th on."),
        (flags.DEFINE_bool, "dry_run", False, "Only list the runs and check their configs."),
    ),
    "report": (
        TABLE,
        (flags.DEFINE_list, "results", [], "Work directories of sweeps, .jsonl, saved .json."),
        (flags.DEFINE_string, "html", "", "HTML file to write, with figures and images."),
        (flags.DEFINE_string, "markdown", "", "Markdown file to write."),
        (flags.DEFINE_string, "save", "", "JSON file to record the shown results in."),
    ),
}
OVERRIDE = re.compile(r"--config\.([\w.]+)=(.*)", re.DOTALL)


def parse(mode: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of a mode's `run`; flags.Error for bad flags.

    overrides: {field: text} of --config.FIELD=VALUE. Not every row needs to have the field, such as
    one of an earlier stage.
    """
    values = flags.FlagValues()
    values.set_gnu_getopt()
    for define, name, default, meaning in FLAGS[mode]:
        define(name, default, meaning, flag_values=values)
    rest = values([mode, *arguments], known_only=True)[1:]
    parsed = values.flag_values_dict()
    overrides = {}
    for argument in rest:
        match = OVERRIDE.fullmatch(argument)
        if mode != "sweep" or not match:
            known = ", ".join(f"--{name}" for name in parsed)
            raise flags.Error(f"unexpected argument {argument!r}; mode {mode} has {known}")
        overrides[match[1]] = match[2]
    parsed["table"] = parsed.pop("config")
    return parsed | ({"overrides": overrides} if mode == "sweep" else {})
