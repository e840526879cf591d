"""Sweeps with stubs of training and evaluation: shared trainings, interrupts, shards, failures."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from condiff_jax.config.build import get
from condiff_jax.config.errors import ConfigError
from condiff_jax.evaluation import evaluate
from condiff_jax.runs.workdir import Workdir
from condiff_jax.studies import results, shared_runs, sweep
from condiff_jax.training import loop
from tests.children import CONTEXT
from tests.studies import commands

ROOT = Path(__file__).parents[2]
TABLE = '''
"""A table whose rows share steps, sampling or an earlier stage."""
from tests import tiny

PAPER = {
    "steps=6": {"FID": 3.0},
    "steps=4": {"FID": 4.0},
    "steps=4,guidance=2": {"FID": None},
    "kind=fine": {"FID": 2.0},
    "kind=fine,guidance=2": {"FID": 2.0},
    "kind=fine,size=uniform": {"FID": 2.0},
    "rate=1": {"FID": float("nan")},
}
ROWS = tuple(PAPER)


def get_config(args=None):
    row = {"steps": "4", "kind": "", "guidance": "1", "size": "cosine", "rate": "0", "scale": "x"}
    for item in (args or "").split(","):
        key, value = item.split("=")
        if key not in row:
            raise ValueError(f"unknown config argument {key!r}")
        row[key] = value
    config = tiny.values(**{"optimizer.learning_rate": 1.0 if row["rate"] == "1" else 1e-3})
    config.steps = int(row["steps"])
    config.evaluation.metrics = ("prompt_accuracy",)
    config.sampling.guidance = float(row["guidance"])
    config.conditioning.weighting = row["size"]
    if row["kind"] == "fine":
        config.init.pretrain = tiny.values(batch_size=8)
        config.data.crop = (0.5, 1.0)
    return config
'''


class Stub:
    """Replacements of loop.run and evaluate.run without models; they record their calls."""

    def __init__(self, monkeypatch):
        self.trained, self.evaluated, self.stop, self.errors = [], [], None, {}
        monkeypatch.setattr(loop, "run", self.train)
        monkeypatch.setattr(evaluate, "run", self.evaluate, raising=False)

    def train(self, config, workdir):
        folder = Workdir(workdir)
        if (folder.checkpoints / str(config.steps)).exists():
            return loop.Outcome(None)
        if config.init.pretrain and not self.train(config.init.pretrain, config.init.path):
            return None
        if config.optimizer.learning_rate == 1.0:
            raise FloatingPointError("step 3: loss nan,\nlower it")
        if self.errors:
            raise self.errors.pop("train")
        saved = folder.checkpoints.iterdir() if folder.checkpoints.exists() else ()
        first = max((int(step.name) for step in saved), default=0)
        if self.stop == len(self.trained):
            self.stop = None
            return None
        self.trained.append((folder.path.name, first, config.steps))
        (folder.checkpoints / str(config.steps)).mkdir(parents=True)
        (folder.checkpoints / str(config.steps) / "state").write_text("parameters")
        folder.vocabulary.write_text("{}")
        folder.config.write_text(config.to_json())
        with folder.metrics.open("a") as file:
            for step in range(first + 1, config.steps + 1):
                file.write(json.dumps({"step": step, "step_time": 2.0}) + "\n")
        return loop.Outcome(None)

    def evaluate(self, config, workdir):
        self.evaluated.append((Path(workdir).name, config.sampling.guidance))
        record = {
            "step": config.steps,
            "metrics": {"accuracy": config.seed + config.sampling.guidance},
            "sampling": {"guidance": config.sampling.guidance},
            "evaluation": {"samples": 2},
            "features": "sha",
            "pictures": {"grid": "samples/4.png"},
            "seconds": 1.5,
        }
        return [record]


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(sweep, "release", lambda: None)  # slow, and there is nothing to release
    return Stub(monkeypatch)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "tableX.py"
    path.write_text(TABLE)
    return str(path)


def read(workdir, name="results.jsonl"):
    return [json.loads(line) for line in (Path(workdir) / name).read_text().splitlines()]


def test_rows_share_trainings_stages_and_shorter_runs(stub, table, tmp_path):
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs") == 0
    by_row = {record["row"]: record for record in read(tmp_path / "runs")}
    assert set(by_row) == set(results.load_table(table)["ROWS"])
    folder = {row: record["folder"] for row, record in by_row.items()}
    assert folder["steps=4"] == folder["steps=4,guidance=2"] != folder["steps=6"]
    assert folder["kind=fine"] == folder["kind=fine,guidance=2"] != folder["kind=fine,size=uniform"]
    starts = {name: (first, last) for name, first, last in stub.trained}
    assert len(stub.trained) == len(starts) == 5  # including the stage that two rows start from
    assert starts[folder["steps=6"]] == (4, 6)
    assert [steps for name, _, steps in stub.trained if name in folder.values()][:2] == [4, 6]
    assert by_row["steps=4,guidance=2"]["metrics"] == {"accuracy": 2.0}
    assert by_row["steps=4"]["metrics"] == {"accuracy": 1.0}
    # Steps take 2 s. steps=6 has 6 steps, 4 of them in the shorter run; kind=fine 4 after 4.
    assert by_row["steps=6"]["seconds"] == {"training": 12.0, "evaluation": 1.5}
    assert by_row["kind=fine"]["seconds"]["training"] == 16.0


def test_records_have_settings_and_provenance(stub, table, tmp_path):
    arguments = [
        f"--config={table}",
        f"--workdir={tmp_path}/runs",
        "--rows=steps=4",
        "--scale=tiny",
    ]
    arguments += ["--config.conditioning.control=('size',)"]
    assert commands.sweep(*arguments, f"--config.data.path={tmp_path}", "--seeds=3") == 0
    (record,) = read(tmp_path / "runs")
    expected = {
        "table": "tableX", "row": "steps=4", "seed": 3, "scale": "tiny", "steps": 4,
        "status": "done", "overrides": {"conditioning.control": ["size"]},
        "metrics": {"accuracy": 4.0}, "sampling": {"guidance": 1.0}, "evaluation": {"samples": 2},
        "pictures": {"grid": "samples/4.png"}, "device": "cpu", "devices": 8,
    }  # fmt: skip
    assert {name: record[name] for name in expected} == expected
    assert set(record["versions"]) == {"jax", "flax", "numpy"}
    assert str(tmp_path) not in json.dumps(record)
    config = json.loads((tmp_path / "runs" / record["folder"] / "config.json").read_text())
    assert config["conditioning"]["control"] == ["size"]


def test_files_are_recorded_by_name_only(stub, table, tmp_path):
    arguments = [f"--config={table}", f"--workdir={tmp_path}/runs", "--rows=steps=4"]
    assert commands.sweep(*arguments, "--config.evaluation.lpips=/home/me/alexnet.npz") == 0
    (record,) = read(tmp_path / "runs")
    assert record["overrides"] == {"evaluation.lpips": "alexnet.npz"}


def test_a_changed_recipe_is_run_again(stub, table, tmp_path):
    arguments = [f"--config={table}", f"--workdir={tmp_path}/runs", "--rows=steps=4"]
    assert commands.sweep(*arguments) == commands.sweep(*arguments) == 0
    assert len(stub.trained) == 1
    path = Path(table)
    path.write_text(path.read_text().replace("else 1e-3", "else 2e-3"))
    assert commands.sweep(*arguments) == 0
    assert len(stub.trained) == 2
    old, new = read(tmp_path / "runs")
    assert old["folder"] != new["folder"]
    (latest,) = results.read([str(tmp_path / "runs")])
    assert latest["folder"] == new["folder"]


def test_of_several_failures_the_last_counts(tmp_path):
    record = {"table": "t", "row": "r", "seed": 0, "scale": "small", "status": "failed"}
    lines = [{**record, "reason": reason} for reason in ("first", "second")]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [result["reason"] for result in results.read([str(tmp_path)])] == ["second"]


def test_without_metrics_a_row_is_trained_and_shown(stub, table, tmp_path):
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}", "--rows=steps=*") == 0
    by_row = {record["row"]: record for record in read(tmp_path)}
    assert by_row["steps=6"]["status"] == "done" and by_row["steps=6"]["metrics"]
    count = len(stub.evaluated)
    arguments = ["--rows=steps=6", "--config.evaluation.metrics=()"]
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}", *arguments) == 0
    record = read(tmp_path)[-1]
    assert record["status"] == "done" and record["metrics"] == {}
    assert record["pictures"] == {"grid": "samples/6.png"}
    assert len(stub.evaluated) == count


def test_finished_rows_are_skipped_and_others_are_not(stub, table, tmp_path, capsys):
    arguments = [f"--config={table}", f"--workdir={tmp_path}/runs", "--rows=steps=*"]
    assert commands.sweep(*arguments) == 0
    count = len(stub.evaluated)
    assert commands.sweep(*arguments) == 0
    assert len(stub.evaluated) == count == 3
    assert "[3/3] steps=6, seed 0: done before" in capsys.readouterr().out
    for more in ("--seeds=1", "--scale=tiny", "--config.sampling.steps=2"):
        before = len(stub.evaluated)
        assert commands.sweep(*arguments, more) == 0
        assert len(stub.evaluated) == before + 3, more


def test_all_stages_have_the_seed(table):
    config, _ = sweep.create(results.load_table(table), "kind=fine", "", 7, {})
    assert config.seed == config.init.pretrain.seed == 7


def test_a_longer_run_starts_from_a_copy_of_the_longest_shorter_one(stub, table, tmp_path):
    def go(steps):
        arguments = ["--rows=steps=6", f"--config.steps={steps}"]
        assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}", *arguments) == 0
        return stub.trained[-1][1:]

    assert [go(steps) for steps in (6, 3, 9, 7)] == [(0, 6), (0, 3), (6, 9), (6, 7)]
    folders = [record["folder"] for record in read(tmp_path)]
    assert len(set(folders)) == 4
    assert [int(name.rsplit("-")[-1]) for name in folders] == [6, 3, 9, 7]
    assert Workdir(tmp_path / folders[0]).metrics.read_text().count("\n") == 6


def test_an_incomplete_copy_is_not_a_run(stub, table, tmp_path, monkeypatch):
    config, _ = sweep.create(results.load_table(table), "steps=4", "", None, {})
    stub.train(config, tmp_path / shared_runs.folder_name(config))
    longer, _ = sweep.create(results.load_table(table), "steps=6", "", None, {})
    workdir = epath.Path(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(shared_runs, "_copy", _fail_at_vocabulary(shared_runs._copy))
        shared_runs.start_from_shorter(longer, workdir)
    assert not (workdir / shared_runs.folder_name(longer)).exists()
    assert shared_runs.start_from_shorter(longer, workdir) == shared_runs.folder_name(config)
    copied = workdir / shared_runs.folder_name(longer) / "checkpoints" / "4" / "state"
    assert copied.read_text() == "parameters"
    assert not list(workdir.glob("*.part"))


def _fail_at_vocabulary(copy):
    def fail(old, new):
        if old.name == "vocabulary.json":
            raise OSError("disk full")
        copy(old, new)

    return fail


@pytest.mark.parametrize("stop", range(5))
def test_an_interrupted_sweep_resumes(stub, table, tmp_path, stop, capsys):
    stub.stop = stop
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs") == 0
    assert len(stub.trained) == stop
    assert "the same command goes on" in capsys.readouterr().out
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs") == 0
    records = read(tmp_path / "runs")
    assert sorted(record["row"] for record in records) == sorted(results.load_table(table)["ROWS"])
    assert len(stub.trained) == 5 and len(set(stub.trained)) == 5


def test_sigterm_during_an_evaluation_ends_in_order(stub, table, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    measure = stub.evaluate
    monkeypatch.setattr(evaluate, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs") == 0
    assert capsys.readouterr().out.endswith("Stopped; the same command goes on from there.\n")
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "runs" / "results.jsonl").exists()
    monkeypatch.setattr(evaluate, "run", measure)
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs") == 0
    assert len(read(tmp_path / "runs")) == 7


def test_a_diverged_row_is_a_result_and_a_failed_one_runs_again(stub, table, tmp_path, capsys):
    stub.errors["train"] = ConfigError("data.path", "gone")
    arguments = [f"--config={table}", f"--workdir={tmp_path}/runs", "--rows=steps=4;rate=1"]
    assert commands.sweep(*arguments) == 1
    records = {record["row"]: record for record in read(tmp_path / "runs")}
    assert records["rate=1"]["status"] == "diverged"
    assert records["rate=1"]["reason"] == "step 3: loss nan, lower it"
    assert records["steps=4"]["status"] == "failed"
    assert records["steps=4"]["reason"] == "data.path: gone"
    assert "failed (data.path: gone)" in capsys.readouterr().out
    assert commands.sweep(*arguments) == 0
    assert [record["row"] for record in read(tmp_path / "runs")].count("rate=1") == 1
    known = {record["row"]: record["status"] for record in results.read([tmp_path / "runs"])}
    assert known == {"steps=4": "done", "rate=1": "diverged"}


def test_an_unexpected_error_leaves_the_other_rows_alone(stub, table, tmp_path, capsys):
    stub.errors["train"] = RuntimeError("out of memory")
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}/runs", "--rows=steps=*") == 1
    statuses = [record["status"] for record in read(tmp_path / "runs")]
    assert statuses == ["failed", "done", "done"]
    assert read(tmp_path / "runs")[0]["reason"] == "RuntimeError: out of memory"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_are_disjoint_and_complete(stub, table, tmp_path, count):
    folders, rows = [], []
    for index in range(count):
        arguments = [f"--workdir={tmp_path}/runs", f"--shard={index}/{count}", "--seeds=0,1"]
        assert commands.sweep(f"--config={table}", *arguments) == 0
        records = read(tmp_path / "runs", f"results-{index}.jsonl")
        assert records
        rows += [(record["row"], record["seed"]) for record in records]
        folders.append({name for name, _, _ in stub.trained})
        stub.trained.clear()
    expected = [(row, seed) for row in results.load_table(table)["ROWS"] for seed in (0, 1)]
    assert sorted(rows) == sorted(expected)
    assert sum(map(len, folders)) == len(set.union(*folders)) == 10


def test_dry_run_shows_shared_and_finished_runs_and_writes_nothing(stub, table, tmp_path, capsys):
    arguments = [f"--config={table}", f"--workdir={tmp_path}/runs"]
    assert commands.sweep(*arguments, "--dry_run") == 0
    assert not (tmp_path / "runs").exists()
    out = capsys.readouterr().out
    assert "steps=4, seed 0: to do" in out
    assert ", shared with steps=4, seed 0" in out and ", shared with kind=fine, seed 0" in out
    assert out.count("starts from ") == 3
    assert out.endswith("7 runs, 6 trainings, 3 groups\n")
    commands.sweep(*arguments, "--rows=steps=4")
    commands.sweep(*arguments, "--dry_run")
    assert "steps=4, seed 0: done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "field, text, value",
    [
        ("steps", "12", 12),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("data.flip", "false", False),
        ("data.name", "shapes", "shapes"),
        ("data.path", "12", "12"),
        ("conditioning.control", "()", ()),
        ("data.crop", "(0.4, 0.6)", (0.4, 0.6)),
        ("init.pretrain.steps", "3", 3),
    ],
)
def test_overrides_have_the_type_of_the_field(table, field, text, value):
    config, values = sweep.create(results.load_table(table), "kind=fine", "", None, {field: text})
    assert get(config, field) == value
    assert type(values[field]) is type(value)


def test_an_override_of_the_earlier_stage_skips_rows_without_one(stub, table, tmp_path):
    arguments = ["--rows=kind=fine;steps=4", "--config.init.pretrain.steps=2"]
    assert commands.sweep(f"--config={table}", f"--workdir={tmp_path}", *arguments) == 0
    assert sorted(steps for _, _, steps in stub.trained) == [2, 4, 4]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--workdir"),
        (["--rows=weight=*"], "matches none of"),
        (["--seeds=a"], "not a list such as 0,1"),
        (["--shard=2/2"], "2/2"),
        (["--shard=1"], "not one of 0/N"),
        (["--steps=3"], "unexpected argument '--steps=3'"),
        (["--config.steps"], "unexpected argument"),
        (["--config.steps=abc"], "steps: must be of type int, got 'abc'"),
        (["--config.data.flip=3"], "data.flip: must be of type bool"),
        (["--config.data.crop=1"], "data.crop: must be two fractions"),
        (["--config.modle.name=ours"], "modle.name: no such field"),
        (["--config.model=ours"], "model: no such field"),
        (["--config.model.name=sit"], "choose from"),
        (["--config.seed=1"], "is set by --seeds"),
        (["--config.init.pretrain.seed=1"], "is set by --seeds"),
        (["--config.init.path=x"], "kind=fine begins with a stage of its own"),
        (["--config.init.pretrain.init.path=x"], "kind=fine begins with a stage of its own"),
        (["--config.data.crop={[]:1}"], "data.crop: must be of type float"),
        (["--rows=steps=4", "--config.init.pretrain.steps=2"], "no row has an earlier stage"),
        (["--scale=huge,x=1"], "unknown config argument 'x'"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(stub, table, tmp_path, arguments, message, capsys):
    where = [f"--workdir={tmp_path}/runs"] if arguments else []
    assert commands.sweep(f"--config={table}", *where, *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["nothing.py", "table3", str(ROOT / "configs/quickstart.py")])
def test_only_tables_can_be_swept(name, tmp_path, capsys):
    assert commands.sweep(f"--config={name}", f"--workdir={tmp_path}/runs") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and name in err


@pytest.mark.parametrize(
    "text, message",
    [
        ("ROWS = ('a',)\nx = undefined", "NameError: name 'undefined' is not defined"),
        ("ROWS = ('a',)", "cannot be run: it has no get_config"),
    ],
)
def test_tables_that_do_not_load_are_one_line(text, message, tmp_path, capsys):
    (tmp_path / "t.py").write_text(text)
    assert commands.sweep(f"--config={tmp_path}/t.py", f"--workdir={tmp_path}/runs") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_an_incomplete_line_is_skipped_and_other_files_are_errors(stub, table, tmp_path, capsys):
    arguments = [f"--config={table}", f"--workdir={tmp_path}", "--rows=steps=4"]
    assert commands.sweep(*arguments) == 0
    path = tmp_path / "results.jsonl"
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert commands.sweep(*arguments, "--seeds=1") == 0
    assert [record["seed"] for record in read(tmp_path)] == [0, 1]
    (record,) = (line for line in read(tmp_path) if line["seed"] == 1)
    del record["status"]
    for wrong in ({"loss": 1}, record):
        path.write_text(json.dumps(wrong) + "\n")
        assert commands.sweep(*arguments) == 2
        assert "not a file of results" in capsys.readouterr().err


def test_trainings_from_different_folders_are_different(table):
    module = results.load_table(table)
    first, second = (
        sweep.create(module, "steps=4", "", None, {"init.path": path})[0] for path in ("a", "b")
    )
    assert shared_runs.folder_name(first) != shared_runs.folder_name(second)


def test_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    (tmp_path / "results.py").write_text("1")
    assert results.commit() == ""
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    assert results.commit() == ""  # a checkout, but not of this package
    subprocess.run([*git, "add", "results.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "package"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert results.commit() == head.strip()
    (tmp_path / "results.py").write_text("2")
    assert results.commit() == head.strip() + "-dirty"


@pytest.mark.parametrize("mode", ["sweep", "report"])
def test_bad_flags_are_one_line_and_code_2_before_jax_is_loaded(mode):
    command = [sys.executable, "-X", "importtime", "-m", "condiff_jax.main", f"--mode={mode}"]
    process = subprocess.run(
        [*command, "--config=configs/table3.py", "--confg=x"], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "GLIBC_TUNABLES": ""},
    )  # fmt: skip
    assert process.returncode == 2 and process.stdout == ""
    error = process.stderr.splitlines()[-1]
    assert error.startswith(f"error: unexpected argument '--confg=x'; mode {mode} has --config, --")
    modules = {line.split("|")[-1].strip() for line in process.stderr.splitlines()}
    assert "absl.flags" in modules and not {"jax", "matplotlib"} & modules


def test_all_three_ways_to_write_a_flag_work(table, tmp_path, capsys):
    words = ["--mode", "sweep", "--config", table, "--rows=steps=4", "--rows", "rate=*;steps=6"]
    assert commands.run("--workdir", tmp_path, *words, "-dry_run") == 0
    assert capsys.readouterr().out.endswith("3 runs, 3 trainings, 2 groups\n")


def end_with_whether_matplotlib_is_loaded():
    sys.exit(int("matplotlib" in sys.modules))


def test_only_mode_report_loads_matplotlib():
    """This module imports mode sweep, and the forked process all other modes."""
    process = CONTEXT.Process(target=end_with_whether_matplotlib_is_loaded)
    process.start()
    process.join()
    assert process.exitcode == 0
