"""Mode `sweep`: train and evaluate all rows of a table, with every seed.

    python -m condiff_jax.main --mode=sweep --config=configs/table3.py --workdir=runs/table3

WORKDIR/results.jsonl gets a line for each row and seed, which mode report shows beside the paper's
numbers. Rows that differ only in sampling share a training; rows with the same earlier stage share
that stage; a training resumes from a shorter one with the same config. The same command resumes an
interrupted sweep.
"""

from __future__ import annotations

import dataclasses
import datetime
import fnmatch
import gc
import itertools
import re
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from condiff_jax.config.build import build, from_text, with_fields
from condiff_jax.config.errors import ConfigError, one_line
from condiff_jax.config.identity import digest, stage_prefixes, stages
from condiff_jax.config.schema import Config
from condiff_jax.evaluation import evaluate
from condiff_jax.objectives import summary
from condiff_jax.objectives.validate import validate
from condiff_jax.runtime.files import append_json
from condiff_jax.studies import results, shared_runs
from condiff_jax.training import loop

STAGES = r"(init\.pretrain\.)*"
# Paths of data change no result and are not recorded; of other files only the name is recorded.
DATA_PATH = re.compile(STAGES + r"(data|autoencoder|text_encoder)\.path")
FILE = re.compile(
    STAGES + r"(evaluation\.lpips|sampling\.(prompt_file|classifier)|convert\.source)"
)
RECORDED = ("metrics", "sampling", "evaluation", "features", "pictures")


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of a table with one seed."""

    row: str
    seed: int
    config: Config  # with the folders of its earlier stages
    folder: str  # within the sweep's work directory

    @property
    def title(self) -> str:
        """The row and the seed."""
        return f"{self.row or 'the only row'}, seed {self.seed}"

    @property
    def length(self) -> tuple[int, int]:
        """Stages and steps: shorter trainings run first, for longer ones to start from."""
        return len(stages(self.config)), self.config.steps


def create(
    module: dict, row: str, scale: str, seed: int | None, overrides: Mapping[str, str]
) -> tuple[Config, dict[str, Any]]:
    """Create a row's config, with the seed (if any) in all stages, and the values of its overrides.

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
        fields = [f"{prefix}seed" for prefix, _ in stage_prefixes(config)]
        config = with_fields(config, dict.fromkeys(fields, seed))
    for field in values:
        if re.fullmatch(STAGES + r"init\.path", field) and len(stages(config)) > 1:
            raise ConfigError(field, f"cannot be set here: {row} begins with a stage of its own")
    validate(config)
    return config, values


def select(rows: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The rows that match a pattern, or all without patterns; ConfigError for an unused pattern."""
    matches = {pattern: fnmatch.filter(rows, pattern) for pattern in patterns}
    for pattern in patterns:
        if not matches[pattern]:
            raise ConfigError("--rows", f"{pattern} matches none of: {'; '.join(rows)}")
    return [row for row in rows if not patterns or any(row in m for m in matches.values())]


def plan(
    module: dict,
    rows: Sequence[str],
    seeds: Sequence[int | None],
    workdir: epath.Path,
    scale: str,
    overrides: Mapping[str, str],
) -> tuple[list[list[Run]], dict[str, Any]]:
    """Groups of runs that share a stage, and the values of the overrides."""
    values: dict[str, Any] = {}
    groups: list[tuple[set[str], list[Run]]] = []  # (digests of the stages, runs)
    for seed, row in itertools.product(seeds, rows):
        config, row_values = create(module, row, scale, seed, overrides)
        values |= row_values
        folder = shared_runs.folder_name(config)
        run = Run(row, config.seed, shared_runs.with_stage_folders(config, workdir), folder)
        digests = {digest(stage) for stage in stages(config)}
        runs = [run]
        unrelated = []
        for group_digests, group_runs in groups:
            if group_digests & digests:
                digests, runs = digests | group_digests, group_runs + runs
            else:
                unrelated.append((group_digests, group_runs))
        groups = [*unrelated, (digests, runs)]
    for field in overrides:
        if field not in values:
            raise ConfigError(field, "no row has an earlier stage with this field")
    return [sorted(runs, key=lambda run: run.length) for _, runs in groups], values


def measure(run: Run, workdir: epath.Path) -> dict[str, Any] | None:
    """Train and evaluate one run; return its result, or None if SIGTERM stopped the training."""
    path = workdir / run.folder
    if jax.process_index() == 0:
        for stage in stages(run.config):
            if source := shared_runs.start_from_shorter(stage, workdir):
                print(f"{shared_runs.folder_name(stage)} resumes from {source}")
    outcome = loop.run(run.config, str(path))
    if outcome is None:
        return None
    if outcome.record:
        evaluation = outcome.record
    elif run.config.evaluation.metrics:  # the training was there, with another evaluation
        (evaluation,) = evaluate.run(run.config, str(path))
    else:  # the sample grid of the training is the only result
        evaluation = dict.fromkeys(RECORDED) | {"metrics": {}, "seconds": 0.0}
        evaluation["pictures"] = {"grid": f"samples/{run.config.steps}.png"}
    training = round(shared_runs.training_seconds(run.config, path), 1)
    seconds = {"training": training, "evaluation": evaluation["seconds"]}
    return {"status": "done", **{name: evaluation[name] for name in RECORDED}, "seconds": seconds}


def attempt(run: Run, workdir: epath.Path) -> dict[str, Any] | None:
    """Run `measure`, with errors as results, so that the other rows run."""
    try:
        return measure(run, workdir)
    except FloatingPointError as error:
        return {"status": "diverged", "reason": one_line(error)}
    except ConfigError as error:
        return {"status": "failed", "reason": one_line(error)}
    except Exception as error:  # such as out of memory; later rows may need less
        traceback.print_exc()
        return {"status": "failed", "reason": f"{type(error).__name__}: {one_line(error)}"}
    finally:
        release()


def release() -> None:
    """Free a row's device memory: arrays in reference cycles and compiled programs."""
    gc.collect()
    jax.clear_caches()


def execute(statuses: Mapping[Run, str], path: epath.Path, common: dict[str, Any]) -> int:
    """Run all unfinished rows and print their progress; return exit code 1 if a row failed.

    path: the file of results, in the work directory. common: fields of all results.
    """
    provenance = results.provenance()
    begin = time.monotonic()
    remaining = sum(status not in results.FINISHED for status in statuses.values())
    attempted = failed = 0
    for number, (run, status) in enumerate(statuses.items(), 1):
        head = f"[{number}/{len(statuses)}] {run.title}:"
        if status in results.FINISHED:
            print(f"{head} {status} before", flush=True)
            continue
        print(f"{head} {run.folder}", flush=True)
        result = attempt(run, path.parent)
        if result is None:
            print(f"{head} stopped; the same command goes on from there", flush=True)
            return 0
        record = common | {"row": run.row, "seed": run.seed, "steps": run.config.steps}
        if jax.process_index() == 0:
            append_json(path, record | {"folder": run.folder, **result, **provenance})
        attempted += 1
        failed += result["status"] == "failed"
        reason = f" ({result['reason']})" if "reason" in result else ""
        elapsed = time.monotonic() - begin
        times = elapsed, elapsed / attempted * (remaining - attempted)
        spent, left = (datetime.timedelta(seconds=round(seconds)) for seconds in times)
        outcome = f"{result['status']}{reason}, elapsed {spent}, about {left} to go"
        print(f"{head} {outcome}", flush=True)
    return 1 if failed else 0


def describe(groups: Sequence[Sequence[Run]], statuses: Mapping[Run, str]) -> str:
    """Describe a sweep: each run with its training and the stages it shares."""
    lines = []
    first_user: dict[str, Run] = {}
    for number, runs in enumerate(groups):
        lines.append(f"group {number}")
        for run in runs:
            lines.append(f"  {run.title}: {statuses[run] or 'to do'}")
            for stage in stages(run.config)[::-1]:
                name = shared_runs.folder_name(stage)
                verb = "training" if stage is run.config else "starts from"
                user = first_user.setdefault(name, run)
                shared = "" if user is run else f", shared with {user.title}"
                lines.append(f"    {verb} {name}{shared}")
    total = f"{len(statuses)} runs, {len(first_user)} trainings, {len(groups)} groups"
    return "\n".join([*lines, total])


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """["0", "1"] -> [0, 1]."""
    try:
        return [int(text) for text in texts]
    except ValueError:
        raise ConfigError("--seeds", f"{','.join(texts)} is not a list such as 0,1") from None


def parse_shard(text: str) -> tuple[int, int]:
    """1/4 -> (1, 4)."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise ConfigError("--shard", f"{text} is not one of 0/N, ..., N-1/N")
    return int(match[1]), int(match[2])


def run(
    workdir: str | None,
    *,
    table: str,
    scale: str,
    rows: Sequence[str],
    seeds: Sequence[str],
    shard: str,
    dry_run: bool,
    overrides: Mapping[str, str],
) -> int:
    """Sweep a table and return the exit code; the arguments are the flags of mode sweep."""
    module = results.load_table(table)
    if not workdir:
        raise ConfigError("--workdir", "missing; mode sweep needs it")
    if "get_config" not in module:
        raise ConfigError(table, "cannot be run: it has no get_config")
    for field in overrides:
        if re.fullmatch(STAGES + "seed", field):
            raise ConfigError(f"--config.{field}", "is set by --seeds")
    index, count = parse_shard(shard or "0/1")
    patterns = [pattern for text in rows for pattern in text.split(";") if pattern]
    selected = select(module["ROWS"], patterns)
    folder = epath.Path(workdir)
    groups, values = plan(module, selected, parse_seeds(seeds) or [None], folder, scale, overrides)
    groups = groups[index::count]
    recorded = {
        field: Path(value).name if FILE.fullmatch(field) else value
        for field, value in values.items()
        if not DATA_PATH.fullmatch(field)
    }
    common = {"table": Path(table).stem, "scale": scale or "paper", "overrides": recorded}
    # Results of a changed recipe have another folder and do not count.
    known = {
        (results.identify(record), record["folder"]): record["status"]
        for record in (results.read([workdir]) if folder.exists() else [])
    }
    statuses = {}
    for run in itertools.chain.from_iterable(groups):
        key = results.identify(common | {"row": run.row, "seed": run.seed})
        statuses[run] = known.get((key, run.folder), "")
    if dry_run:
        print(describe(groups, statuses))
        for run in statuses:
            summary.check(run.config)
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    output = f"results-{index}.jsonl" if shard else "results.jsonl"
    return execute(statuses, folder / output, common)
