#!/bin/bash
# Part of tpu_vm.sh that runs on each host of a slice: starts a command that survives a lost connection.
#
#   launch/tpu_worker.sh install | start COMMAND... | status | log | wait | stop
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
mkdir -p .run
action=${1:-}
shift || true

# `go` holds the lock while the command runs. Unlike a file with a process id, a lock ends with it.
busy() { ! flock --nonblock .run/lock true; }

# Prints running; the exit code; empty (full disk); or lost (the host or the command was killed).
status() {
  local code
  if busy; then
    echo running
  elif code=$(cat .run/exit 2>/dev/null); then
    echo "${code:-empty}"
  else
    echo lost
  fi
}

case $action in
  install) # the Python of the VM images is too old
    export PIP_BREAK_SYSTEM_PACKAGES=1
    python3 -m pip install --quiet --user --upgrade uv
    [[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python=3.12 .venv
    python3 -m uv pip install --quiet --python=.venv/bin/python -e ".[tpu,gcs]"
    ;;
  start)
    exec 9>.run/lock
    flock --nonblock 9 || { echo "error: a command is running already" >&2 && exit 2; }
    rm -f .run/exit
    : >.run/log
    PATH=$PWD/.venv/bin:$PATH nohup setsid launch/tpu_worker.sh go "$@" </dev/null >>.run/log 2>&1 &
    echo $! >.run/pid
    ;;
  go) # called only by start
    code=0
    # shellcheck source=launch/xla_flags.sh
    . launch/xla_flags.sh tpu
    # shellcheck source=launch/stoppable.sh
    . launch/stoppable.sh
    stoppable "$@" 9>&- || code=$?
    echo "$code" >.run/exit
    ;;
  status) status ;;
  log) # until the command ends
    if busy; then
      tail --lines=+1 --follow --pid="$(cat .run/pid)" .run/log
    else
      cat .run/log 2>/dev/null || true
    fi
    ;;
  wait)
    flock .run/lock true
    status
    ;;
  stop) if busy; then kill -TERM "$(cat .run/pid)"; fi ;;
  *)
    echo "error: tpu_worker.sh: no action '$action'" >&2
    exit 2
    ;;
esac
