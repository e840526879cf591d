"""Job scripts: the commands they make, seen by stand-ins for srun, scontrol and gcloud on PATH."""

import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").iterdir())
# Appends its name and arguments to $CALLS, one line (and one write) a call, then runs $DO.
STUB = """#!/bin/bash
echo "$(printf '%q ' "${0##*/}" "$@")" >>"$CALLS"
eval "${DO:-}"
"""
TASK = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.fixture
def stubs(tmp_path):
    """(environment with stand-ins, function that reads their calls)."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("srun", "scontrol", "gcloud"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
    }

    def read():
        lines = calls.read_text().splitlines() if calls.exists() else []
        return sorted(shlex.split(line) for line in lines)

    return environment, read


def launch(name, *args, env, cwd):
    command = ["bash", str(ROOT / "launch" / name), *args]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK)


def test_slurm_runs_the_shard_of_the_array_task(stubs, tmp_path):
    env, calls = stubs
    args = ["configs/table3.py", "--workdir=runs/table 3", "--rows=padding=*"]
    more = {**TASK, "SLURM_ARRAY_TASK_MAX": "3", "PYTHON": "python3.11"}
    done = launch("sweep.sbatch", *args, env=env | more, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = ["srun", "python3.11", "-m", "condiff_jax.sweep", *args, "--shard=1/4"]
    assert calls() == [expected]


def test_slurm_without_an_array_runs_all(stubs, tmp_path):
    env, calls = stubs
    done = launch("sweep.sbatch", "t.py", env=env | {"SLURM_JOB_ID": "7"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert calls() == [["srun", "python", "-m", "condiff_jax.sweep", "t.py", "--shard=0/1"]]


def test_slurm_one_task_again_keeps_the_number_of_shards(stubs, tmp_path):
    env, calls = stubs
    more = {**TASK, "SLURM_ARRAY_TASK_MAX": "1", "SWEEP_SHARDS": "4"}
    launch("sweep.sbatch", "t.py", env=env | more, cwd=tmp_path)
    assert calls()[0][-1] == "--shard=1/4"


def test_slurm_array_that_leaves_out_the_first_shards_is_refused(stubs, tmp_path):
    env, calls = stubs
    more = {**TASK, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    done = launch("sweep.sbatch", "t.py", env=env | more, cwd=tmp_path)
    assert done.returncode == 2 and "SWEEP_SHARDS" in done.stderr and not calls()
    launch("sweep.sbatch", "t.py", env=env | more | {"SWEEP_SHARDS": "5"}, cwd=tmp_path)
    assert calls()[0][-1] == "--shard=1/5"


def test_slurm_fails_as_the_sweep_does(stubs, tmp_path):
    env, calls = stubs
    done = launch("sweep.sbatch", "t.py", env=env | TASK | {"DO": "exit 2"}, cwd=tmp_path)
    assert done.returncode == 2
    assert [call[0] for call in calls()] == ["srun"]


def test_slurm_passes_sigterm_on_waits_and_is_queued_again(stubs, tmp_path):
    env, calls = stubs
    # Saves for half a second when told to stop, as training does.
    saves = (
        '[[ ${0##*/} == srun ]] || exit 0; trap "sleep 0.5; touch saved; exit 0" TERM; '
        "touch begun; while :; do sleep 0.05; done"
    )
    command = ["bash", str(ROOT / "launch" / "sweep.sbatch"), "t.py"]
    job = subprocess.Popen(command, env=env | TASK | {"DO": saves}, cwd=tmp_path)
    deadline = time.time() + 30
    while not (tmp_path / "begun").exists():
        assert time.time() < deadline and job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "saved").exists()
    assert calls()[0] == ["scontrol", "requeue", "70_1"]


def test_slurm_asks_for_the_signal_before_the_limit_and_to_be_queued_again():
    options = {
        line.removeprefix("#SBATCH ")
        for line in (ROOT / "launch" / "sweep.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH ")
    }
    assert {"--signal=B:TERM@300", "--requeue", "--open-mode=append"} <= options


def test_tpu_vms_get_a_shard_each(stubs, tmp_path):
    env, calls = stubs
    args = [
        "configs/table3.py",
        "--workdir=gs://b/x",
        "--rows=a=1;b=*",
        "--config.data.path=my dir",
    ]
    done = launch("sweep_tpu.sh", "tpu-a,tpu-b", *args, env=env | {"ZONE": "z1"}, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "tpu-a: done\ntpu-b: done\n"
    assert len(calls()) == 2
    for index, (name, call) in enumerate(zip(("tpu-a", "tpu-b"), calls(), strict=True)):
        ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, "--zone=z1"]
        assert call[:-1] == ssh
        remote = call[-1].removeprefix("--command=")
        expected = ["cd", "condiff_jax", "&&", "python3", "-m", "condiff_jax.sweep", *args]
        assert shlex.split(remote) == [*expected, f"--shard={index}/2"]
        assert (tmp_path / f"sweep-{name}.log").exists()


def test_tpu_vms_of_a_project_that_fail_are_named(stubs, tmp_path):
    env, calls = stubs
    more = {"ZONE": "z1", "PROJECT": "p", "DO": '[[ "$*" != *tpu-b* ]]'}
    done = launch("sweep_tpu.sh", "tpu-a,tpu-b", "t.py", env=env | more, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == "tpu-a: done\n"
    assert done.stderr == "error: tpu-b: see sweep-tpu-b.log\n"
    assert all("--project=p" in call for call in calls())


@pytest.mark.parametrize("args, zone", [([], "z"), (["tpu-a"], "z"), (["tpu-a", "t.py"], "")])
def test_tpu_bad_arguments_are_one_line(stubs, tmp_path, args, zone):
    env, calls = stubs
    done = launch("sweep_tpu.sh", *args, env=env | {"ZONE": zone}, cwd=tmp_path)
    assert done.returncode == 2 and calls() == []
    assert done.stderr.startswith("error: usage: ") and done.stderr.count("\n") == 1
