"""Slurm jobs: their options, two processes that train, and sweeps."""

import json
import signal
import socket
import subprocess
import sys

import pytest

from tests.compiling import QUICK
from tests.launch.jobs import EVIL, LAUNCH, MARKER, ROOT, SRUN, launch, one_line, started, wait_for

TASK = {"SLURM_JOB_ID": "71", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize("name", ["sweep.sbatch", "slurm.sbatch"])
def test_slurm_requests_a_signal_before_the_limit_and_requeueing(name):
    lines = (LAUNCH / name).read_text().splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=B:TERM@300", "--requeue", "--open-mode=append"} <= options


@pytest.mark.parametrize("name", ["sweep.sbatch", "slurm.sbatch"])
@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_slurm_saves_and_is_requeued_unless_canceled(stubs, project, name, state):
    env, calls = stubs
    # Saves for half a second after SIGTERM, as training does.
    saves = (
        '[[ ${0##*/} == srun ]] || exit 0; trap "sleep 0.5; touch saved; exit 0" TERM; '
        "touch begun; while :; do sleep 0.05; done"
    )
    env |= TASK | {"DO": saves, "STATE": state}
    with started("bash", f"launch/{name}", "t.py", env=env, cwd=project) as job:
        wait_for((project / "begun").exists, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 0
    assert (project / "saved").exists()
    assert (["scontrol", "requeue", "70_1"] in calls()) == (state == "RUNNING")


@pytest.mark.parametrize("name", ["sweep.sbatch", "slurm.sbatch"])
def test_slurm_has_the_exit_code_of_the_command(stubs, project, name):
    env, calls = stubs
    process = launch(name, "t.py", env=env | TASK | {"DO": "exit 2"}, cwd=project)
    assert process.returncode == 2
    assert [call[0] for call in calls()] == ["srun"]


def test_slurm_runs_a_process_per_gpu_or_node(stubs, project):
    env, calls = stubs
    env["DO"] = 'echo "ids=${JAX_LOCAL_DEVICE_IDS:-} flags=$XLA_FLAGS"'
    command = ["sbatch", "--nodes=2", "launch/slurm.sbatch", "python", "-m", "x", "--name=a b"]

    def step(**more):
        process = subprocess.run(
            command, env=env | more, cwd=project, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return calls()[-1], process.stdout

    call, out = step()
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8", "--cpus-per-task=12"} < set(call)
    assert {"--gpu-bind=none", "--kill-on-bad-exit=1"} < set(call)
    assert call[-4:] == command[-4:]
    assert out.startswith("ids= flags=--xla_gpu")
    call, out = step(PROCESSES="node")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=96"} < set(call)
    assert out.startswith("ids=0,1,2,3,4,5,6,7 flags=--xla_gpu")  # JAX would use GPU 0 only


@pytest.mark.parametrize(
    "command, words",
    [
        ("sbatch launch/slurm.sbatch", "no command"),
        ("sbatch --gpus-per-node=4 launch/slurm.sbatch true", "4 GPUs but 8 tasks"),
        ("PROCESSES=host sbatch launch/slurm.sbatch true", "PROCESSES=host"),
        ("cd launch && sbatch slurm.sbatch true", "the project's folder"),
    ],
)
def test_slurm_bad_settings_are_one_line(stubs, project, command, words):
    env, calls = stubs
    process = subprocess.run(
        ["bash", "-c", command], env=env, cwd=project, capture_output=True, text=True
    )
    one_line(process, words)
    assert "srun" not in [call[0] for call in calls()]


@pytest.mark.slow
def test_slurm_trains_with_two_processes_that_save_together(stubs, tmp_path):
    env, calls = stubs
    (tmp_path / "bin/srun").write_text(SRUN)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        env["JAX_COORDINATOR_PORT"] = str(free.getsockname()[1])
    env["XLA_FLAGS"] = QUICK
    train = [sys.executable, "-m", "condiff_jax.main", "--config=configs/quickstart.py"]
    train += ["--config.steps=100000", "--config.batch_size=2", "--config.model.unroll=1"]
    train += ["--config.log.every=1", "--config.parallel.fsdp=2", f"--workdir={tmp_path}/w"]
    options = ["--ntasks-per-node=2", "--gpus-per-node=2", "launch/slurm.sbatch"]
    with (
        (tmp_path / "log").open("w") as log,
        started("sbatch", *options, *train, env=env, cwd=ROOT, stdout=log, stderr=log) as job,
    ):
        wait_for((tmp_path / "w/metrics.jsonl").exists, job, seconds=240)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert calls()[-1] == ["scontrol", "requeue", "71"]
    (saved,) = (tmp_path / "w/checkpoints").iterdir()
    lines = (tmp_path / "w/metrics.jsonl").read_text().splitlines()
    assert int(saved.name) >= json.loads(lines[0])["step"]
    assert all((saved / f"state/ocdbt.process_{process}").is_dir() for process in (0, 1))


def test_slurm_sweep_runs_the_shard_of_the_array_task(stubs, project):
    env, calls = stubs
    args = ["--config=configs/table3.py", "--workdir=runs/table 3", "--rows=padding=*"]
    more = {**TASK, "SLURM_ARRAY_TASK_MAX": "3", "PYTHON": "python3.11"}
    process = launch("sweep.sbatch", *args, env=env | more, cwd=project)
    assert process.returncode == 0, process.stderr
    expected = ["srun", "python3.11", "-m", "condiff_jax.main", "--mode=sweep", *args]
    assert calls() == [[*expected, "--shard=1/4"]]


def test_slurm_sweep_without_an_array_runs_all(stubs, project):
    env, calls = stubs
    process = launch("sweep.sbatch", "--config=t.py", env=env | {"SLURM_JOB_ID": "7"}, cwd=project)
    assert process.returncode == 0, process.stderr
    command = ["srun", "python", "-m", "condiff_jax.main", "--mode=sweep", "--config=t.py"]
    assert calls() == [[*command, "--shard=0/1"]]


def test_slurm_sweep_of_one_task_keeps_the_number_of_shards(stubs, project):
    env, calls = stubs
    more = {**TASK, "SLURM_ARRAY_TASK_MAX": "1", "SWEEP_SHARDS": "4"}
    launch("sweep.sbatch", "--config=t.py", env=env | more, cwd=project)
    assert calls()[0][-1] == "--shard=1/4"


def test_slurm_sweep_without_the_first_shards_is_an_error(stubs, project):
    env, calls = stubs
    more = {**TASK, "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "4"}
    one_line(launch("sweep.sbatch", "--config=t.py", env=env | more, cwd=project), "SWEEP_SHARDS")
    assert not calls()
    launch("sweep.sbatch", "--config=t.py", env=env | more | {"SWEEP_SHARDS": "5"}, cwd=project)
    assert calls()[0][-1] == "--shard=1/5"


NUMBERS = {
    "slurm.sbatch": ["JOB_NUM_NODES", "NTASKS_PER_NODE", "GPUS_ON_NODE", "CPUS_PER_TASK"],
    "sweep.sbatch": ["ARRAY_TASK_MIN", "ARRAY_TASK_MAX", "ARRAY_TASK_ID"],
}


@pytest.mark.parametrize("value", [EVIL, "08", "4.5", "-1", "1\n2"])
@pytest.mark.parametrize(
    "name, variable",
    [(name, f"SLURM_{ending}") for name, endings in NUMBERS.items() for ending in endings]
    + [("sweep.sbatch", "SWEEP_SHARDS")],
)
def test_slurm_runs_no_command_in_a_number(stubs, project, name, variable, value):
    env, calls = stubs
    for processes in ("gpu", "node"):
        more = {"SLURM_JOB_ID": "71", "PROCESSES": processes, variable: value}
        one_line(launch(name, "t.py", env=env | more, cwd=project), variable, "is not a number")
    assert not calls() and not (project / MARKER).exists()
