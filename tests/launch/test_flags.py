"""Job scripts: compiler flags, and how a command is stopped."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.launch.jobs import LAUNCH, ROOT, one_line, started, wait_for

SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_and_can_be_run(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!/bin/bash")


def flags(platform, variable, **env):
    command = f'. launch/xla_flags.sh {platform} && echo "${variable}"'
    env = {"PATH": os.environ["PATH"], **env}
    done = subprocess.run(
        ["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip() if done.returncode == 0 else done


def test_flags_of_the_user_win_and_all_are_known_to_the_compiler():
    mine = "--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=3"
    value = flags("gpu", "XLA_FLAGS", XLA_FLAGS=mine)
    assert value.endswith(f"=false {mine}")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": value}
    count = "import jax; print(jax.device_count())"
    done = subprocess.run([sys.executable, "-c", count], env=env, capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr  # an unknown flag ends the process


def test_flags_of_tpus_go_to_libtpu():
    assert flags("tpu", "XLA_FLAGS", XLA_FLAGS="--mine") == "--mine"
    value = flags("tpu", "LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS="--mine")
    assert re.fullmatch(r"(--xla\w+=\w+ )+--mine", value)


def test_memory_of_gpus_keeps_what_the_user_asks_for():
    name, before = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert flags("gpu", name) == "0.9"
    assert flags("gpu", name, **{name: "0.5"}) == "0.5"
    assert flags("gpu", name, **{before: "0.5"}) == ""  # JAX takes one of the two names


def test_flags_of_no_platform_are_refused():
    one_line(flags("cuda", "XLA_FLAGS"), "cuda", "gpu or tpu")


def test_each_flag_says_why():
    lines = [line.strip() for line in (LAUNCH / "xla_flags.sh").read_text().splitlines()]
    found = [i for i, line in enumerate(lines) if line.startswith("--")]
    assert found and all(lines[i - 1].startswith("#") for i in found)


def test_run_passes_sigterm_on_waits_and_does_not_look_finished(tmp_path):
    saves = 'trap "sleep 0.3; touch saved; exit 0" TERM; touch begun; while :; do sleep 0.05; done'
    command = ["bash", str(LAUNCH / "run.sh"), "tpu", "bash", "-c", saves]
    with started(*command, cwd=tmp_path) as job:
        wait_for((tmp_path / "begun").exists, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_run_ends_as_its_command(tmp_path, code):
    check = f'[[ $LIBTPU_INIT_ARGS == --xla* && $1 == "a b" ]] && exit {code}; exit 9'
    done = subprocess.run([LAUNCH / "run.sh", "tpu", "bash", "-c", check, "-", "a b"], cwd=tmp_path)
    assert done.returncode == code
