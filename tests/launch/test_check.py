"""Commands that README and scripts print are ones that start; scripts check theirs beforehand."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.jobs import LAUNCH, ROOT, actions, launch, one_line, readme_blocks

PYTHON = re.compile(r"python -m condiff_jax\.main [^\n`]*")
# Reads commands, and says of each why it would not start: forks, because flags are parsed once.
CHECKER = """
import json, os, sys
from condiff_jax import main
from condiff_jax.config.errors import ConfigError
from condiff_jax.objectives import summary
from condiff_jax.objectives.validate import create_config
from condiff_jax.studies import results, sweep

def check(arguments):
    sys.argv = ["condiff_jax", *arguments]  # where ml_collections looks for config.FIELD
    study = main.parse(sys.argv)
    if main.MODE.value == "sweep":
        sweep.run(main.WORKDIR.value, **study | {"dry_run": True})
    elif main.MODE.value == "report":  # of results that are not here
        assert not study["table"] or results.load_table(study["table"])["PAPER"]
    else:
        check_config(create_config(main.CONFIG.value))

def check_config(config):
    if main.MODE.value in ("train", "evaluate"):  # an imported model is sampled without data
        assert main.WORKDIR.value
        summary.check(config)

for command in json.load(sys.stdin):
    if not os.fork():
        try:
            check(command[3:])
        except ConfigError as error:
            print(command[3:], error, file=sys.stderr, flush=True)
        os._exit(0)
    os.wait()
"""
COMMAND = ["python", "-m", "condiff_jax.main", "--config=configs/table1.py:arch=ours"]
FILES = ["--config.data.path=DATA", "--config.autoencoder.path=VAE"]
BUCKET = "--workdir=gs://BUCKET/RUN"


def printed():
    """Commands by where they are printed: README's, and those of the scripts' headers."""
    texts = {"README.md": (ROOT / "README.md").read_text()}
    for path in LAUNCH.iterdir():
        lines = (line for line in path.read_text().splitlines() if line.startswith("#"))
        texts[path.name] = "\n".join(line.lstrip("# ") for line in lines)
    found = []
    for name, text in texts.items():
        text = re.sub(r"\\\n\s*| \[--[^]]*\]", "", text)  # and what may be left out
        text = text.replace("$(JOB_COMPLETION_INDEX)", "0")
        for command in PYTHON.findall(text):
            words = shlex.split(re.split(r" (?:#|&&) ", command)[0])
            if "..." not in words:
                found.append((name, words))
        for command in re.findall(r"COMMAND='(\[.*?\])'", text, re.S):
            found.append((name, json.loads(command)))
    return found


def test_printed_commands_start():
    found = printed()
    names = [name for name, _ in found]
    assert names.count("README.md") > 20 and {"tpu_vm.sh", "slurm.sbatch"} < set(names)
    # Two have a condition in README: a file that the block writes, and "with these two files".
    commands = [command for _, command in found if "cifar10_conditioning.py" not in str(command)]
    assert len(commands) == len(found) - 2
    done = subprocess.run(
        [sys.executable, "-c", CHECKER], input=json.dumps(commands), cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr


@pytest.fixture
def whole(project, stubs):
    """(checkout with the package, environment with checks, calls)."""
    for name in ("condiff_jax", "configs"):
        shutil.copytree(ROOT / name, project / name)
    env, calls = stubs
    subprocess.run(["git", "-C", project, "add", "."], check=True)
    del env["CHECK"]
    return project, env | {"ZONE": "z1", "TYPE": "v6e-16", "SLURM_JOB_ID": "7"}, calls


@pytest.mark.parametrize(
    "script, words",
    [
        pytest.param(
            ["tpu_vm.sh", "up", "n", *COMMAND, FILES[0], BUCKET],
            "autoencoder.path: empty",
            marks=pytest.mark.slow,
        ),
        (["tpu_vm.sh", "run", "n", *COMMAND, FILES[1], BUCKET], "data.path: empty"),
        (
            ["slurm.sbatch", *COMMAND, *FILES, BUCKET, "--config.model.name=x"],
            "model.name: unknown value 'x'",
        ),
        (["sweep_tpu.sh", "a,b", "--config=configs/table1.py", BUCKET], "data.path: empty"),
        pytest.param(
            ["sweep.sbatch", "--config=configs/table3.py", "--workdir=x", "--rows=y"],
            "matches none",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_scripts_check_before_they_ask_for_hardware(whole, script, words):
    project, env, calls = whole
    one_line(launch(*script, env=env, cwd=project), words)
    assert calls() == []


@pytest.mark.parametrize("command", [["true"], [*COMMAND, "--mode=export"], [*COMMAND, *FILES]])
def test_scripts_let_through_what_starts_or_is_not_checked(whole, command):
    project, env, calls = whole
    done = launch("slurm.sbatch", *command, "--workdir=x", env=env, cwd=project)
    assert done.returncode == 0, done.stderr
    assert calls()[-1][-len(command) - 1 : -1] == command


def test_scripts_say_how_to_check_where_the_package_is_not_installed(whole, tmp_path):
    project, env, calls = whole
    python = tmp_path / "other"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    for other in (python, tmp_path / "none"):
        more = {"PYTHON": str(other), "PYTHONPATH": ""}
        done = launch("slurm.sbatch", *COMMAND, *FILES, env=env | more, cwd=project)
        one_line(done, "cannot be checked here (", "pip install -e .", "CHECK=0")
    assert launch(
        "slurm.sbatch", *COMMAND, *FILES, env=env | more | {"CHECK": "0"}, cwd=project
    ).returncode == 0  # fmt: skip
    assert [call[0] for call in calls()] == ["srun"]


def test_slurm_and_tpu_commands_of_the_readme(whole, tmp_path):
    project, env, calls = whole
    venv = 'mkdir -p .venv/bin; printf \'#!/bin/bash\\necho "python $*" >>"%s"\\n\' "$CALLS" '
    venv += ">.venv/bin/python; chmod +x .venv/bin/python"  # as `install` on a host
    env |= {"DO": f"[[ $* != *venv* ]] || {{ {venv}; }}", "CHECK": "0"}  # they are checked above
    for block in readme_blocks():
        if "kubectl" in block:
            continue
        done = subprocess.run(
            ["bash", "-euc", block], env=env, cwd=project, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    srun, *_ = [call for call in calls() if call[0] == "srun"]
    assert "condiff_jax.main" in srun
    runs = [call for call in calls() if call[0] == "python"]
    assert len(runs) == 2 and all("condiff_jax.main" in call for call in runs)  # two hosts
    assert actions(calls())[-1].endswith("delete")
