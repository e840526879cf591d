"""Commands in README and scripts start, and scripts check a command before they use hardware."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.launch.jobs import LAUNCH, ROOT, actions, launch, one_line, readme_blocks

PYTHON = re.compile(r"python -m condiff_jax\.main [^\n`]*")
# Reads commands and prints the errors of those that do not start. Forks, as flags parse only once.
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
    elif main.MODE.value == "report":  # its results are not here
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
    """(file, command) of README and of the scripts' headers."""
    texts = {"README.md": (ROOT / "README.md").read_text()}
    for path in LAUNCH.iterdir():
        lines = (line for line in path.read_text().splitlines() if line.startswith("#"))
        texts[path.name] = "\n".join(line.lstrip("# ") for line in lines)
    commands_by_file = []
    for name, text in texts.items():
        text = re.sub(r"\\\n\s*| \[--[^]]*\]", "", text)  # and optional flags
        text = text.replace("$(JOB_COMPLETION_INDEX)", "0")
        for command in PYTHON.findall(text):
            words = shlex.split(re.split(r" (?:#|&&) ", command)[0])
            if "..." not in words:
                commands_by_file.append((name, words))
        for command in re.findall(r"COMMAND='(\[.*?\])'", text, re.S):
            commands_by_file.append((name, json.loads(command)))
    return commands_by_file


def test_printed_commands_start():
    commands_by_file = printed()
    names = [name for name, _ in commands_by_file]
    assert names.count("README.md") > 20 and {"tpu_vm.sh", "slurm.sbatch"} < set(names)
    # Two need something else in README: a file that the block writes, and "these two files".
    commands = [
        command for _, command in commands_by_file if "cifar10_conditioning.py" not in str(command)
    ]
    assert len(commands) == len(commands_by_file) - 2
    process = subprocess.run(
        [sys.executable, "-c", CHECKER], input=json.dumps(commands), cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert process.returncode == 0 and not process.stderr, process.stderr


@pytest.fixture
def package(project, stubs):
    """(checkout with the package, environment with CHECK on, function that reads the calls)."""
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
def test_scripts_check_before_they_request_hardware(package, script, words):
    project, env, calls = package
    one_line(launch(*script, env=env, cwd=project), words)
    assert calls() == []


@pytest.mark.parametrize("command", [["true"], [*COMMAND, "--mode=export"], [*COMMAND, *FILES]])
def test_scripts_run_commands_that_start_or_are_not_checked(package, command):
    project, env, calls = package
    process = launch("slurm.sbatch", *command, "--workdir=x", env=env, cwd=project)
    assert process.returncode == 0, process.stderr
    assert calls()[-1][-len(command) - 1 : -1] == command


def test_scripts_say_how_to_check_where_the_package_is_not_installed(package, tmp_path):
    project, env, calls = package
    python = tmp_path / "other"
    python.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')  # without site-packages
    python.chmod(0o755)
    for interpreter in (python, tmp_path / "none"):
        more = {"PYTHON": str(interpreter), "PYTHONPATH": ""}
        process = launch("slurm.sbatch", *COMMAND, *FILES, env=env | more, cwd=project)
        one_line(process, "cannot be checked here (", "pip install -e .", "CHECK=0")
    assert launch(
        "slurm.sbatch", *COMMAND, *FILES, env=env | more | {"CHECK": "0"}, cwd=project
    ).returncode == 0  # fmt: skip
    assert [call[0] for call in calls()] == ["srun"]


def test_slurm_and_tpu_commands_of_the_readme(package, tmp_path):
    project, env, calls = package
    venv = 'mkdir -p .venv/bin; printf \'#!/bin/bash\\necho "python $*" >>"%s"\\n\' "$CALLS" '
    venv += ">.venv/bin/python; chmod +x .venv/bin/python"  # as after `install` on a host
    env |= {"DO": f"[[ $* != *venv* ]] || {{ {venv}; }}", "CHECK": "0"}  # checked above
    for block in readme_blocks():
        if "kubectl" in block:
            continue
        process = subprocess.run(
            ["bash", "-euc", block], env=env, cwd=project, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
    srun, *_ = [call for call in calls() if call[0] == "srun"]
    assert "condiff_jax.main" in srun
    runs = [call for call in calls() if call[0] == "python"]
    assert len(runs) == 2 and all("condiff_jax.main" in call for call in runs)  # two hosts
    assert actions(calls())[-1].endswith("delete")
