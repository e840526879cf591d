"""All rows of a table: `python -m condiff_jax.sweep configs/table3.py --workdir=runs/table3`.

Every row is trained and evaluated with every seed; WORKDIR/results.jsonl gets a line for each, and
`python -m condiff_jax.report` shows them beside the paper's numbers. Rows that differ only in
sampling share a training, rows that start from the same earlier stage share that stage, and a
training goes on from a shorter one of the same kind. The same command goes on after an interrupt.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gc
import re
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from etils import epath

from condiff_jax import kinship, results
from condiff_jax.config.build import build, from_text, with_fields
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.identity import digest, stage_prefixes, stages
from condiff_jax.config.schema import Config
from condiff_jax.evaluation import evaluate
from condiff_jax.objectives import summary
from condiff_jax.objectives.validate import validate
from condiff_jax.runtime.distributed import abort_on_error, initialize, is_multiprocess
from condiff_jax.runtime.files import append_json
from condiff_jax.runtime.process import fail, stoppable, use_huge_pages
from condiff_jax.training import loop

DATA_PATH = re.compile(r"(init\.pretrain\.)*(data|autoencoder|text_encoder)\.path")
FILE = re.compile(
    r"(init\.pretrain\.)*(evaluation\.lpips|sampling\.(prompt_file|classifier)|convert\.source)"
)


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a table with one seed; `config` knows where its earlier stages are."""

    row: str
    seed: int
    config: Config
    folder: str  # within the sweep's work directory


def create(
    module: dict, row: str, scale: str, seed: int | None, overrides: dict[str, str]
) -> tuple[Config, dict[str, Any]]:
    """A row's config (its stages all with `seed`, if given) and the overrides' values.

    Overrides of init.pretrain are left out of rows without an earlier stage.
    """
    arguments = ",".join(filter(None, (row, scale and f"scale={scale}")))
    try:
        config = build(module["get_config"](arguments))
    except ValueError as error:
        raise ConfigError("--scale" if scale else "row", one_line(error)) from error
    values = {
        field: from_text(field, text)
        for field, text in overrides.items()
        if config.init.pretrain is not None or not field.startswith("init.pretrain.")
    }
    config = with_fields(config, values)
    if seed is not None:
        config = with_fields(
            config, {f"{prefix}seed": seed for prefix, _ in stage_prefixes(config)}
        )
    validate(config)
    return config, values


def select(rows: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The rows that match one of the patterns, all without any; ConfigError for idle patterns."""
    for pattern in patterns:
        if not fnmatch.filter(rows, pattern):
            raise ConfigError("--rows", f"{pattern} matches none of: {'; '.join(rows)}")
    return [
        row
        for row in rows
        if not patterns or any(fnmatch.fnmatchcase(row, pattern) for pattern in patterns)
    ]


def plan(
    module: dict,
    rows: Sequence[str],
    seeds: Sequence[int | None],
    workdir: epath.Path,
    *,
    scale: str = "",
    overrides: dict[str, str] | None = None,
) -> tuple[list[list[Run]], dict[str, Any]]:
    """Groups of runs that share a stage, shorter trainings first, and the overrides' values."""
    used: dict[str, Any] = {}
    groups: list[tuple[set[str], list[Run]]] = []
    for seed in seeds:
        for row in rows:
            config, found = create(module, row, scale, seed, overrides or {})
            starts = [
                field for field in found if re.fullmatch(r"(init\.pretrain\.)*init\.path", field)
            ]
            if starts and len(stages(config)) > 1:
                raise ConfigError(
                    starts[0],
                    f"cannot be set here: {row} begins with a stage of its own",
                )
            used |= found
            run = Run(row, config.seed, kinship.place(config, workdir), kinship.folder_name(config))
            kin = {digest(stage) for stage in stages(config)}
            # Merge all groups that the new run is related to.
            related = [group for group in groups if group[0] & kin]
            groups = [group for group in groups if not group[0] & kin]
            runs = [one for group in related for one in group[1]] + [run]
            groups.append((kin.union(*(group[0] for group in related)), runs))
    for field in overrides or {}:
        if field not in used:
            raise ConfigError(field, "no row has an earlier stage to set it of")
    order = lambda run: (len(stages(run.config)), run.config.steps)  # noqa: E731
    return [sorted(runs, key=order) for _, runs in groups], used


def measure(run: Run, workdir: epath.Path) -> dict[str, Any] | None:
    """Train and evaluate one run; its result, or None if SIGTERM stopped the training."""
    path = workdir / run.folder
    if jax.process_index() == 0:
        for stage in stages(run.config):
            if source := kinship.start_from_shorter(stage, workdir):
                print(f"{kinship.folder_name(stage)} goes on from {source}")
    if not loop.run(run.config, str(path)):
        return None
    names = ("metrics", "sampling", "evaluation", "features", "pictures")
    if run.config.evaluation.metrics:
        (found,) = evaluate.run(run.config, str(path))
    else:  # as on the paper's data: training leaves a grid to look at
        grid = {"grid": f"samples/{run.config.steps}.png"}
        found = dict.fromkeys(names) | {"metrics": {}, "pictures": grid, "seconds": 0.0}
    return {
        "status": "done",
        **{name: found[name] for name in names},
        "seconds": {
            "training": round(kinship.training_seconds(run.config, path), 1),
            "evaluation": found["seconds"],
        },
    }


def attempt(run: Run, workdir: epath.Path) -> dict[str, Any] | None:
    """`measure`, with what went wrong as a result: the other rows shall run."""
    try:
        return measure(run, workdir)
    except FloatingPointError as error:
        return {"status": "diverged", "reason": one_line(error)}
    except ConfigError as error:
        return {"status": "failed", "reason": one_line(error)}
    except Exception as error:  # such as too little memory; later rows may need less
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
    finally:
        release()


def release() -> None:
    """Free what a row leaves on the device: arrays in reference cycles, compiled programs."""
    gc.collect()
    jax.clear_caches()


def execute(
    runs: Sequence[Run], done: dict[tuple, tuple], workdir: epath.Path, output: str, common
):
    """Run what is not done; one line each. Exit code 1 if rows failed, else 0.

    done: (folder, status) by `results.identify`; common: what all results share (table, scale,
    overrides).
    """
    same, begin, tried, failed = results.provenance(), time.monotonic(), 0, 0
    left = sum(_status(run, done, common) not in results.FINISHED for run in runs)
    for number, run in enumerate(runs, 1):
        head = f"[{number}/{len(runs)}] {run.row or 'the only row'}, seed {run.seed}:"
        if (status := _status(run, done, common)) in results.FINISHED:
            print(f"{head} {status} before", flush=True)
            continue
        print(f"{head} {run.folder}", flush=True)
        found = attempt(run, workdir)
        if found is None:
            print(f"{head} stopped; the same command goes on from there", flush=True)
            return 0
        record = common | {"row": run.row, "seed": run.seed, "steps": run.config.steps}
        record |= {"folder": run.folder, **found, **same}
        if jax.process_index() == 0:
            append_json(workdir / output, record)
        tried, failed = tried + 1, failed + (found["status"] == "failed")
        elapsed = time.monotonic() - begin
        reason = f" ({found['reason']})" if "reason" in found else ""
        print(
            f"{head} {found['status']}{reason}, elapsed {_clock(elapsed)}, "
            f"about {_clock(elapsed / tried * (left - tried))} to go",
            flush=True,
        )
    return 1 if failed else 0


def describe(groups: Sequence[Sequence[Run]], done: dict[tuple, tuple], common: dict) -> str:
    """What a sweep would do: a line for each run, with the training and stages it shares."""
    lines, first_user = [], {}
    for number, runs in enumerate(groups):
        lines.append(f"group {number}")
        for run in runs:
            status = _status(run, done, common) or "to do"
            lines.append(f"  {run.row or 'the only row'}, seed {run.seed}: {status}")
            for stage in stages(run.config)[::-1]:
                name = kinship.folder_name(stage)
                what = "training" if stage is run.config else "starts from"
                user = first_user.setdefault(name, run)
                shared = "" if user is run else f", shared with {user.row}, seed {user.seed}"
                lines.append(f"    {what} {name}{shared}")
    runs = sum(map(len, groups))
    return "\n".join([*lines, f"{runs} runs, {len(first_user)} trainings, {len(groups)} groups"])


def _status(run: Run, done: dict[tuple, tuple], common: dict) -> str:
    """ "" where there is no result, or one of another recipe: its folder has another digest."""
    key = results.identify(common | {"row": run.row, "seed": run.seed})
    folder, status = done.get(key, ("", ""))
    return status if folder == run.folder else ""


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def seeds(text: str) -> list[int]:
    """0,1 -> [0, 1]."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,1") from None


def shard(text: str) -> tuple[int, int]:
    """1/4 -> (1, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of 0/N, ..., N-1/N")
    return int(match[1]), int(match[2])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; `overrides` maps the fields of --config.FIELD=VALUE to their text."""
    parser = results.Parser("python -m condiff_jax.sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument("table", help="config file with ROWS, such as configs/table3.py")
    parser.add_argument("--workdir", required=True, help="folder of all runs and results")
    parser.add_argument("--scale", default="", help="paper (default) | small | tiny")
    parser.add_argument(
        "--rows", action="append", default=[], help="patterns of rows, separated by ; or repeated"
    )
    parser.add_argument("--seeds", type=seeds, help="such as 0,1; default: the config's")
    parser.add_argument(
        "--shard", type=shard, metavar="I/N", help="run every N-th group of runs from the I-th"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and lacks")
    parser.epilog = "--config.FIELD=VALUE sets a field of every row, as for condiff_jax.main"
    known, rest = parser.parse_known_args(argv)
    known.overrides = {}
    for argument in rest:
        match = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument, re.DOTALL)
        if not match:
            parser.error(f"unexpected argument {argument!r}")
        known.overrides[match[1]] = match[2]
    for field in known.overrides:
        if re.fullmatch(r"(init\.pretrain\.)*seed", field):
            parser.error(f"--config.{field}: use --seeds")
    known.rows = [one for patterns in known.rows for one in patterns.split(";") if one]
    return known


def run(argv: Sequence[str]) -> int:
    """Exit code of a sweep; ConfigError for bad arguments."""
    args = parse(argv)
    module, workdir = results.load_table(args.table), epath.Path(args.workdir)
    if "get_config" not in module:
        raise ConfigError(args.table, "cannot be run: it has no get_config")
    rows = select(module["ROWS"], args.rows)
    groups, overrides = plan(
        module, rows, args.seeds or [None], workdir, scale=args.scale, overrides=args.overrides
    )
    common = {
        "table": results.table_name(args.table),
        "scale": args.scale or "paper",
        "overrides": {
            # Where data lies makes no other result; of other files the name tells enough.
            field: Path(value).name if FILE.fullmatch(field) else value
            for field, value in overrides.items()
            if not DATA_PATH.fullmatch(field)
        },
    }
    output = "results.jsonl"
    if args.shard:
        index, count = args.shard
        groups, output = groups[index::count], f"results-{index}.jsonl"
    known = results.read([args.workdir]) if workdir.exists() else []
    done = {results.identify(one): (one["folder"], one["status"]) for one in known}
    if args.dry_run:
        print(describe(groups, done, common))
        for one in (run for group in groups for run in group):
            summary.check(one.config)
        return 0
    workdir.mkdir(parents=True, exist_ok=True)
    return execute([run for group in groups for run in group], done, workdir, output, common)


def main(argv: Sequence[str]) -> int:
    """`run` with bad arguments as one line and exit code 2, and SIGTERM as an end in order."""
    initialize(None, None, None)
    with stoppable(agreed=is_multiprocess()), abort_on_error():
        try:
            return run(argv)
        except ConfigError as error:
            return fail(error)
    return 0


if __name__ == "__main__":
    use_huge_pages()
    logging.set_verbosity(logging.WARNING)
    flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
    sys.exit(main(sys.argv[1:]))
