"""The command line: modes, SIGTERM, and one-line errors with exit code 2."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.children import Children
from tests.compiling import QUICK

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config=configs/quickstart.py",
    "--config.model.unroll=1",
    "--config.log.every=1",
    "--config.sampling.n=2",
    "--config.sampling.steps=2",
    "--config.evaluation.prompts=2",
]


def run(*args, config="configs/quickstart.py"):
    """Run `python -m` as users do; importing JAX takes seconds, see `forked`."""
    return subprocess.run(
        [sys.executable, "-m", "condiff_jax.main", f"--config={config}", *args],
        cwd=ROOT, env={**os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip


def forked(folder, *args):
    """(exit code, output) of the same in a process that has imported all modules."""
    with Children(args, folder / "log") as children:
        (code,) = children.wait(120)
        return code, children.outputs()[0]


def test_summary_ends_with_one_json_line():
    done = run("--mode=summary")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"parameters", "gflop_forward"}
    assert "model/blocks/mlp/fc1/kernel" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.modle.name=ours"], "unknown field"),
        (["--config.steps=abc"], "config.steps"),
        (["--mode=trian"], "train|sample|evaluate|reference|summary"),
        (["--confg=x"], "confg"),
        (["--config.model.name=sit"], "model.name: unknown value 'sit'; choose from"),
    ],
)
def test_bad_flags_are_one_line_and_code_2(args, message):
    done = run(*args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--workdir: missing"),
        (["--mode=plan"], "--topology: missing"),
        (["--mode=plan", "--topology=v5e"], "--topology: 'v5e' is unknown; examples: v5e:8x8"),
        (["--workdir=RUN", "--config.data.resolution=33"], "must be a multiple of 4"),
        (["--workdir=RUN", "--mode=sample"], "no run here"),
        (["--workdir=RUN", "--mode=evaluate"], "no run here"),
        (
            ["--workdir=RUN", "--config.data.name=webdataset", "--config.data.path=/no/such"]
            + ["--config.evaluation.metrics=()"],
            "data.path: ",
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(args, message, tmp_path):
    args = [arg.replace("RUN", str(tmp_path)) for arg in args]
    code, output = forked(tmp_path, "--config=configs/quickstart.py", *args)
    assert code == 2 and output.count("\n") == 1, output
    assert output.startswith("error: ") and message in output


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("configs/nothing.py", "No such file"),
        ("configs/quickstart.py:steps=3", "unknown config argument 'steps'"),
    ],
)
def test_bad_config_files_are_one_line_and_code_2(config, message):
    done = run("--mode=summary", config=config)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and message in done.stderr


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_finishes(tmp_path):
    folder = tmp_path / "run"
    arguments = [f"--workdir={folder}", *SMALL]
    with Children([*arguments, "--config.steps=100000"], tmp_path / "endless") as endless:
        (process,) = endless.processes
        metrics, deadline = folder / "metrics.jsonl", time.time() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            assert time.time() < deadline and process.is_alive(), endless.outputs()
            time.sleep(0.1)
        process.terminate()
        assert endless.wait(60) == [0], endless.outputs()
        (out,) = endless.outputs()
    assert "goes on from there" in out
    stopped = int(out.split("Stopped at step ")[1].split(";")[0])
    assert (folder / "checkpoints" / str(stopped)).is_dir()

    again = [*arguments, f"--config.steps={stopped + 2}"]
    code, out = forked(tmp_path, *again)
    assert code == 0 and "Prompt accuracy on 2 unseen prompts" in out, out
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(1, stopped + 3))
    assert (folder / "samples" / f"{stopped + 2}.png").exists()
    evaluation = json.loads((folder / "evaluation.jsonl").read_text())
    assert evaluation["step"] == stopped + 2 and evaluation["evaluation"]["prompts"] == 2
    code, out = forked(tmp_path, *again, "--mode=evaluate")
    assert code == 0 and "already measured" in out, out
    code, out = forked(tmp_path, *again)
    assert code == 0 and "Nothing to do" in out, out
