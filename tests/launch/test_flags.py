"""launch/*.sh: compiler flags, and stopping a command."""

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
    process = subprocess.run(
        ["bash", "-c", command], env=env, cwd=ROOT, capture_output=True, text=True
    )
    return process.stdout.strip() if process.returncode == 0 else process


def test_flags_of_the_user_win_and_the_compiler_knows_all():
    user_flags = "--xla_force_host_platform_device_count=2 --xla_force_host_platform_device_count=3"
    value = flags("gpu", "XLA_FLAGS", XLA_FLAGS=user_flags)
    assert value.endswith(f"=false {user_flags}")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": value}
    count = "import jax; print(jax.device_count())"
    process = subprocess.run([sys.executable, "-c", count], env=env, capture_output=True, text=True)
    assert process.stdout == "3\n", process.stderr  # an unknown flag ends the process


def test_flags_of_tpus_go_to_libtpu():
    assert flags("tpu", "XLA_FLAGS", XLA_FLAGS="--mine") == "--mine"
    value = flags("tpu", "LIBTPU_INIT_ARGS", LIBTPU_INIT_ARGS="--mine")
    assert re.fullmatch(r"(--xla\w+=\w+ )+--mine", value)


def test_memory_fraction_of_the_user_is_used():
    name, before = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    assert flags("gpu", name) == "0.9"
    assert flags("gpu", name, **{name: "0.5"}) == "0.5"
    assert flags("gpu", name, **{before: "0.5"}) == ""  # JAX accepts only one of the two names


def test_an_unknown_platform_is_an_error():
    one_line(flags("cuda", "XLA_FLAGS"), "cuda", "gpu or tpu")


def test_each_flag_has_a_comment():
    lines = [line.strip() for line in (LAUNCH / "xla_flags.sh").read_text().splitlines()]
    indices = [i for i, line in enumerate(lines) if line.startswith("--")]
    assert indices and all(lines[i - 1].startswith("#") for i in indices)


def test_run_forwards_sigterm_waits_and_exits_with_143(tmp_path):
    saves = 'trap "sleep 0.3; touch saved; exit 0" TERM; touch begun; while :; do sleep 0.05; done'
    command = ["bash", str(LAUNCH / "run.sh"), "tpu", "bash", "-c", saves]
    with started(*command, cwd=tmp_path) as job:
        wait_for((tmp_path / "begun").exists, job)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=30) == 143
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_run_has_the_exit_code_of_its_command(tmp_path, code):
    check = f'[[ $LIBTPU_INIT_ARGS == --xla* && $1 == "a b" ]] && exit {code}; exit 9'
    process = subprocess.run(
        [LAUNCH / "run.sh", "tpu", "bash", "-c", check, "-", "a b"], cwd=tmp_path
    )
    assert process.returncode == code
