"""The command line as a user meets it: modes, SIGTERM, and bad input in one line with code 2."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.compiling import QUICK

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config.model.unroll=1",
    "--config.log.every=1",
    "--config.sampling.n=2",
    "--config.sampling.steps=2",
    "--config.evaluation.prompts=2",
]


def command(*args, config="configs/quickstart.py"):
    return [sys.executable, "-m", "condiff_jax.main", f"--config={config}", *args]


def environment():
    return {**os.environ, "XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}


def run(*args, **kwargs):
    return subprocess.run(
        command(*args, **kwargs), cwd=ROOT, env=environment(), capture_output=True, text=True
    )


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
        (["--config.model.name=sit"], "model.name='sit' is unknown; choose from"),
        (["--config.steps=abc"], "config.steps"),
        (["--mode=trian"], "train|sample|evaluate|reference|summary"),
        (["--confg=x"], "confg"),
        ([], "--workdir is missing"),
        (["--mode=plan"], "--topology is missing"),
        (["--mode=plan", "--topology=v5e"], "--topology='v5e' is unknown; examples: v5e:8x8"),
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
    done = run(*[arg.replace("RUN", str(tmp_path)) for arg in args])
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert message in lines[0]


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


def test_sigterm_saves_and_the_same_command_finishes(tmp_path):
    arguments = [f"--workdir={tmp_path}", *SMALL]
    endless = subprocess.Popen(
        command(*arguments, "--config.steps=100000"),
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics, deadline = tmp_path / "metrics.jsonl", time.time() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.time() < deadline and endless.poll() is None
        time.sleep(0.1)
    endless.send_signal(signal.SIGTERM)
    out, err = endless.communicate(timeout=60)
    assert endless.returncode == 0, err
    assert "goes on from there" in out
    stopped = int(out.split("Stopped at step ")[1].split(";")[0])
    assert (tmp_path / "checkpoints" / str(stopped)).is_dir()

    done = run(*arguments, f"--config.steps={stopped + 2}")
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in metrics.open()]
    assert steps == list(range(1, stopped + 3))
    assert "Prompt accuracy on 2 unseen prompts" in done.stdout
    assert (tmp_path / "samples" / f"{stopped + 2}.png").exists()
    evaluation = json.loads((tmp_path / "evaluation.jsonl").read_text())
    assert evaluation["step"] == stopped + 2 and evaluation["evaluation"]["prompts"] == 2
    measured = run(*arguments, f"--config.steps={stopped + 2}", "--mode=evaluate")
    assert measured.returncode == 0 and "already measured" in measured.stdout
    again = run(*arguments, f"--config.steps={stopped + 2}")
    assert again.returncode == 0 and "Nothing to do" in again.stdout
