"""Fake job commands, and helpers of the tests of launch/.

The fake commands record their calls and act as far as one machine can: srun starts its processes,
and the hosts of a TPU slice are folders in which ssh runs its commands.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# Appends its name and arguments to $CALLS, one line (and one write) a call, then runs $DO.
RECORD = """#!/bin/bash
echo "$(printf '%q ' "${0##*/}" "$@")" >>"$CALLS"
"""
STUB = RECORD + 'eval "${DO:-}"\n'
# Reads the options of the file and then the command line, as Slurm does; runs the job at once.
SBATCH = (
    RECORD
    + """
read_options() {
  for option in "$@"; do
    case $option in
      --nodes=*) export SLURM_JOB_NUM_NODES=${option#*=} ;;
      --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${option#*=} ;;
      --cpus-per-task=*) export SLURM_CPUS_PER_TASK=${option#*=} ;;
      --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${option#*=} ;;
    esac
  done
}
options=()
while [[ $1 == --* ]]; do options+=("$1"); shift; done
script=$1
shift
read_options $(sed -n 's/^#SBATCH //p' "$script") "${options[@]}"
SLURM_JOB_ID=71 exec bash "$script" "$@"
"""
)
# Starts --ntasks processes with Slurm's variables, all on this machine.
SRUN = (
    RECORD
    + """
while [[ $1 == --* ]]; do
  case $1 in --ntasks=*) export SLURM_NTASKS=${1#*=} ;; esac
  shift
done
export SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1
for ((i = 0; i < SLURM_NTASKS; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i "$@" &
  tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
  wait "$task" || status=$?
  while kill -0 "$task" 2>/dev/null; do wait "$task"; status=$?; done
done
exit "$status"
"""
)
# A slice of two hosts: states are files, hosts are folders. A file `drop` breaks one connection.
GCLOUD = """#!{python} -SE
import json, os, shlex, shutil, subprocess, sys
from pathlib import Path

args = sys.argv[1:]
cloud = Path(os.environ["CLOUD"])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(shlex.join(["gcloud", *args]) + "\\n")
kind, verb, name = args[2:5]
options = dict(arg[2:].split("=", 1) for arg in args[4:] if arg.startswith("--") and "=" in arg)
node, queue = cloud / "node", cloud / "queue"
if verb == "describe":
    if kind == "queued-resources" and queue.exists() and queue.read_text() == "PROVISIONING":
        queue.write_text("ACTIVE")
        node.write_text("READY")
        print("PROVISIONING")
    elif (file := node if kind == "tpu-vm" else queue).exists():
        print(file.read_text())
    else:
        sys.exit("ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource 'x' was not found")
elif verb == "create":
    file, state = (node, "READY") if kind == "tpu-vm" else (queue, "PROVISIONING")
    file.write_text(state)
elif verb == "delete":
    for file in (node, queue):
        file.unlink(missing_ok=True)
    shutil.rmtree(cloud / "hosts", ignore_errors=True)
elif verb in ("ssh", "scp"):
    if node.read_text() != "READY":
        sys.exit("ERROR: the slice is not READY")
    drop = cloud / "drop"
    if "wait" in options.get("command", "") and drop.exists():
        drop.unlink()
        sys.exit(255)
    worker = options["worker"]
    status = 0
    for host in range(2) if worker == "all" else [int(worker)]:
        home = cloud / "hosts" / str(host)
        home.mkdir(parents=True, exist_ok=True)
        if verb == "scp":
            shutil.copy(name, home)
            continue
        env = os.environ | {{"HOME": str(home), "HOST": str(host)}}
        status |= subprocess.run(["bash", "-c", options["command"]], cwd=home, env=env).returncode
    sys.exit(status)
"""


def launch(name, *args, env, cwd):
    command = ["bash", f"launch/{name}", *args]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=60)


@contextlib.contextmanager
def started(*command, **options):
    """Start a process; at the end, kill it and everything it has started."""
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition, process, seconds=30):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)


MARKER = "MARKER"
EVIL = f"PATH[$(touch${{IFS}}{MARKER})]"  # bash's arithmetic would run this command


def one_line(process, *words):
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    assert all(word in process.stderr for word in words), process.stderr


def actions(calls):
    """The gcloud calls in order, without describe: "kind verb", or the action of a worker."""
    names = []
    for call in calls:
        if call[0] == "gcloud" and call[4] != "describe":
            script = re.search(r"tpu_worker.sh (\w+)", call[-1])
            names.append(script[1] if script else " ".join(call[3:5]))
    return names


def readme_blocks():
    """The code blocks of the README's section on clusters."""
    text = (ROOT / "README.md").read_text()
    section = text.split("## On a TPU VM, Slurm or Kubernetes")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.S)
