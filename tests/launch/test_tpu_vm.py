"""Cloud TPU slices: created, lost, created again, deleted; sweeps on several."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.launch.jobs import (
    EVIL,
    MARKER,
    STUB,
    actions,
    launch,
    one_line,
    started,
    wait_for,
)

TPU = {"ZONE": "z1", "TYPE": "v6e-16"}
BUCKET = "--workdir=gs://bucket/run"


def test_tpu_is_created_installed_and_runs_on_all_hosts(stubs, project):
    env, calls = stubs
    (project / "launch" / "new.txt").write_text("changed, not committed")
    subprocess.run(["git", "-C", project, "add", "."], check=True)
    check = 'echo "$HOST: $1 $LIBTPU_INIT_ARGS"; cat launch/new.txt'
    command = ["bash", "-c", check, "-", "a b'", BUCKET]
    process = launch("tpu_vm.sh", "up", "n", *command, env=env | TPU, cwd=project)
    assert process.returncode == 0, process.stderr
    assert re.search(r"^0: a b' --xla\S+\nchanged, not committed$", process.stdout, re.M)
    order = ["tpu-vm create", "status", "tpu-vm scp", "install", "start", "log", "wait"]
    assert actions(calls()) == order
    log = Path(env["CLOUD"], "hosts/1/condiff_jax/.run/log")
    assert log.read_text().startswith("1: a b'")  # host 1 ran it as well
    pip = [" ".join(call) for call in calls() if call[0] == "python3"]
    assert sum("uv pip install" in call and ".[tpu,gcs]" in call for call in pip) == 2
    assert all("--zone=z1" in call for call in calls() if call[0] == "gcloud")


@pytest.mark.parametrize("state", ["PREEMPTED", "READY"])
def test_a_lost_tpu_is_created_again_until_the_run_ends(stubs, project, tmp_path, state):
    env, calls = stubs
    lives = tmp_path / "lives"
    program = f"echo $HOST >>{lives}; (($(wc -l <{lives}) > 2)) || sleep 100"
    up = ["bash", "launch/tpu_vm.sh", "up", "n", "bash", "-c", program, "-", BUCKET]
    env |= TPU | {"CAPACITY": "spot", "DELETE": "1", "PROJECT": "p"}
    cloud = Path(env["CLOUD"])
    with started(*up, env=env, cwd=project, stdout=subprocess.DEVNULL) as job:
        wait_for(lambda: lives.exists() and len(lives.read_text().split()) == 2, job)
        (cloud / "node").write_text(state)  # READY: the hosts were restarted
        for host in (cloud / "hosts").iterdir():
            os.killpg(int((host / "condiff_jax/.run/pid").read_text()), signal.SIGKILL)
        assert job.wait(timeout=30) == 0
    assert sorted(lives.read_text().split()) == ["0", "0", "1", "1"]
    queue_actions = [action for action in actions(calls()) if action.startswith("queued")]
    again = 2 if state == "PREEMPTED" else 1
    assert queue_actions == ["queued-resources create", "queued-resources delete"] * again
    create, delete = [call for call in calls() if call[4:5] in (["create"], ["delete"])][:2]
    assert create[5:] == [
        "n", "--node-id=n", "--runtime-version=v2-alpha-tpuv6e", "--spot", "--zone=z1",
        "--project=p", "--accelerator-type=v6e-16",
    ]  # fmt: skip
    assert {"--force", "--quiet", "--project=p"} <= set(delete)
    assert not (cloud / "node").exists() and not (cloud / "queue").exists()


def test_tpu_run_survives_a_lost_connection_and_keeps_its_exit_code(stubs, project):
    env, calls = stubs
    Path(env["CLOUD"], "drop").touch()
    fails = "[[ $HOST == 0 ]] || { sleep 2; exit 5; }"
    up = ["up", "n", "bash", "-c", fails, "-", BUCKET]
    process = launch("tpu_vm.sh", *up, env=env | TPU, cwd=project)
    assert process.returncode == 5, process.stderr
    assert actions(calls()).count("start") == 1 and actions(calls()).count("wait") == 2
    assert "tpu-vm delete" not in actions(calls())  # kept for inspection


def test_second_tpu_up_follows_the_running_command_and_stop_saves(stubs, project, tmp_path):
    env, calls = stubs
    saves = (
        f"trap 'touch {tmp_path}/saved$HOST; exit 0' TERM; touch {tmp_path}/begun$HOST; "
        "for i in {1..600}; do sleep 0.1; done"
    )
    up = ["bash", "launch/tpu_vm.sh", "up", "n", "bash", "-c", saves, "-", BUCKET]
    for connection in (1, 2):  # the first one is lost
        with started(*up, env=env | TPU, cwd=project, stdout=subprocess.DEVNULL) as job:
            wait_for(lambda n=connection: actions(calls()).count("log") == n, job)
            wait_for(lambda: all((tmp_path / f"begun{host}").exists() for host in (0, 1)), job)
    assert actions(calls()).count("start") == 1
    busy = launch("tpu_vm.sh", "run", "n", "true", env=env | TPU, cwd=project)
    assert busy.returncode and "running already" in busy.stderr
    assert launch("tpu_vm.sh", "stop", "n", env=env | TPU, cwd=project).returncode == 0
    process = launch("tpu_vm.sh", "follow", "n", env=env | TPU, cwd=project)
    assert process.returncode == 143, process.stderr
    assert (tmp_path / "saved0").exists() and (tmp_path / "saved1").exists()


@pytest.mark.parametrize(
    "kind, version",
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
    ],
)
def test_tpu_on_demand_takes_the_image_of_its_type(stubs, project, kind, version):
    env, calls = stubs
    more = {"ZONE": "z1", "TYPE": kind, "OPTIONS": "--network=a --subnetwork=b"}
    assert launch("tpu_vm.sh", "create", "n", env=env | more, cwd=project).returncode == 0
    create = next(call for call in calls() if call[4] == "create")
    options = ["--zone=z1", f"--accelerator-type={kind}", "--network=a", "--subnetwork=b"]
    assert create[3:] == ["tpu-vm", "create", "n", f"--version={version}", *options]
    assert launch("tpu_vm.sh", "delete", "n", env=env | more, cwd=project).returncode == 0
    assert actions(calls())[-1] == "tpu-vm delete"


@pytest.mark.parametrize(
    "args, more, words",
    [
        ([], {}, ["usage"]),
        (["up"], {}, ["usage"]),
        (["look", "n"], {}, ["look", "follow"]),
        (["create", "n"], {"ZONE": ""}, ["ZONE"]),
        (["create", "n"], {"TYPE": ""}, ["TYPE"]),
        (["create", "n"], {"CAPACITY": "cheap"}, ["CAPACITY=cheap", "spot"]),
        (["run", "n"], {}, ["no command"]),
        (["up", "n", "python", "--workdir=runs/x"], {}, ["--workdir=gs://"]),
    ],
)
def test_tpu_bad_arguments_are_one_line(stubs, project, args, more, words):
    env, calls = stubs
    one_line(launch("tpu_vm.sh", *args, env=env | TPU | more, cwd=project), *words)
    assert actions(calls()) == []


def test_tpu_request_that_failed_is_not_repeated(stubs, project):
    env, calls = stubs
    Path(env["CLOUD"], "queue").write_text("FAILED")
    one_line(launch("tpu_vm.sh", "create", "n", env=env | TPU, cwd=project), "delete n")
    assert actions(calls()) == []


def installed(env, project):
    """Create and install a slice."""
    for action in ("create", "install"):
        assert launch("tpu_vm.sh", action, "n", env=env | TPU, cwd=project).returncode == 0


def test_tpu_sweep_gives_a_shard_to_each(stubs, project, tmp_path):
    env, calls = stubs
    installed(env, project)
    (tmp_path / "bin/python").write_text(STUB)
    (tmp_path / "bin/python").chmod(0o755)
    args = [
        "--config=configs/table3.py",
        "--workdir=gs://b/x",
        "--rows=a=1;b=*",
        "--config.data.path=my dir",
    ]
    process = launch("sweep_tpu.sh", "tpu-a", *args, env=env | TPU, cwd=project)
    assert process.returncode == 0, process.stderr
    assert process.stdout == "tpu-a: done\n"
    assert (project / "sweep-tpu-a.log").exists()
    shard = ["python", "-m", "condiff_jax.main", "--mode=sweep", *args, "--shard=0/1"]
    assert [call for call in calls() if call[0] == "python"] == [shard] * 2


def test_tpu_sweep_names_the_slices_that_fail(stubs, project):
    env, calls = stubs
    process = launch(
        "sweep_tpu.sh", "a,b", "--config=t.py", env=env | TPU, cwd=project
    )  # these slices do not exist
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.splitlines() == [f"error: {n}: see sweep-{n}.log" for n in "ab"]
    starts = sorted(call[5:] for call in calls() if "start" in call[-1])
    assert [start[0] for start in starts] == ["a", "b"]
    assert [start[-1][-3:] for start in starts] == ["0/2", "1/2"]


@pytest.mark.parametrize("code", [EVIL, "", "*", "256", "08", "1 2"])
def test_an_unreadable_tpu_exit_code_is_a_failure(stubs, project, code):
    env, calls = stubs
    installed(env, project)
    for host in (0, 1):
        run = Path(env["CLOUD"], f"hosts/{host}/condiff_jax/.run")
        (run / "exit").write_text((code if host else "0") + "\n")
    one_line(launch("tpu_vm.sh", "follow", "n", env=env | TPU, cwd=project), "n: ", "unreadable")
    assert not [*Path(env["CLOUD"]).rglob(MARKER)] and not (project / MARKER).exists()


@pytest.mark.parametrize(
    "args, zone", [([], "z"), (["tpu-a"], "z"), (["tpu-a", "--config=t.py"], "")]
)
def test_tpu_sweep_bad_arguments_are_one_line(stubs, project, args, zone):
    env, calls = stubs
    one_line(launch("sweep_tpu.sh", *args, env=env | {"ZONE": zone}, cwd=project), "usage")
    assert calls() == []
