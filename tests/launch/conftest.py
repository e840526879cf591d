"""Fixtures of the launch tests: fake commands on PATH, and a checkout of the scripts."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.jobs import GCLOUD, LAUNCH, RECORD, SBATCH, STUB


@pytest.fixture
def stubs(tmp_path):
    """(environment with fake commands on PATH, function that reads their calls)."""
    folder, calls, cloud = tmp_path / "bin", tmp_path / "calls", tmp_path / "cloud"
    folder.mkdir()
    cloud.mkdir()
    texts = dict.fromkeys(("srun", "scontrol", "squeue", "docker", "python3"), STUB)
    texts |= {"sbatch": SBATCH, "gcloud": GCLOUD.format(python=sys.executable)}
    texts["squeue"] = RECORD + 'echo "${STATE:-RUNNING}"\n'
    texts["kubectl"] = RECORD + 'cat >"$CALLS.stdin"\n'
    if not shutil.which("envsubst"):
        expand = "import os, sys; sys.stdout.write(os.path.expandvars(sys.stdin.read()))"
        texts["envsubst"] = f"#!/bin/bash\nexec {sys.executable} -c {shlex.quote(expand)}\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "CLOUD": str(cloud),
        "POLL": "0.1",
        "CHECK": "0",  # most tests have placeholder commands
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }

    def read():
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [shlex.split(line) for line in lines]

    return environment, read


@pytest.fixture
def project(tmp_path):
    """A git repository with only the scripts."""
    folder = tmp_path / "project"
    shutil.copytree(LAUNCH, folder / "launch")
    git = ["git", "-C", str(folder)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    return folder
