#!/bin/bash
# Creates a Cloud TPU slice of one or many hosts, runs a command on it and deletes it.
#
#   export ZONE=us-east5-b TYPE=v6e-16 CAPACITY=spot DELETE=1
#   launch/tpu_vm.sh up NAME python -m condiff_jax.main --config=configs/table1.py:arch=ours \
#     --config.data.path=DATA --config.autoencoder.path=VAE --workdir=gs://BUCKET/RUN
#
#   up NAME COMMAND...   create, install and run; repeated when the slice is preempted or fails, until
#                        the command ends. After a lost connection, run the same command again
#   create NAME          request the slice and wait until it is ready
#   install NAME         copy this folder's tracked files to condiff_jax on all hosts, and install
#   run NAME COMMAND...  start the command on all hosts, and follow it
#   follow NAME          show the log of host 0; exit with the command's exit code
#   stop NAME            send SIGTERM: training saves and ends
#   delete NAME          delete the slice and its queued resource
#
# CAPACITY: on-demand (default), queued (a queued resource), spot (queued; may be preempted).
# DELETE=1: up deletes the slice after the command, also if it fails. PROJECT: gcloud's default if not
# set. VERSION: the VMs' image. OPTIONS: further flags of the creation, such as --network=... With
# several hosts, gcloud needs the key in ssh-agent: ssh-add ~/.ssh/google_compute_engine.
# up and run first check the command on this machine (check.sh); CHECK=0 skips that.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/check.sh
. "$root/launch/check.sh"

fail() {
  echo "error: tpu_vm.sh: $*" >&2
  exit 2
}

action=${1:-} name=${2:-}
[[ -n $name ]] || fail "usage: ZONE=... $0 up|create|install|run|follow|stop|delete NAME [COMMAND...]"
[[ -n ${ZONE:-} ]] || fail "ZONE is not set, such as ZONE=us-east5-b"
shift 2
place=(--zone="$ZONE" ${PROJECT:+"--project=$PROJECT"})
folder=condiff_jax

# describe KIND FIELD: the state of the slice (tpu-vm) or of its queued resource (queued-resources).
describe() {
  local out
  if out=$(gcloud compute tpus "$1" describe "$name" "${place[@]}" --format="value($2)" 2>&1); then
    echo "${out##*$'\n'}"
  elif [[ $out == *NOT_FOUND* ]]; then
    echo MISSING
  else
    echo "$out" >&2
    echo UNKNOWN # most often a lost connection
  fi
}

state() {
  local node
  node=$(describe tpu-vm state)
  if [[ $node == MISSING ]]; then describe queued-resources state.state; else echo "$node"; fi
}

request() {
  local version=${VERSION:-}
  case ${TYPE:-} in
    "") fail "TYPE is not set, such as TYPE=v6e-16" ;;
    v6e-*) : "${version:=v2-alpha-tpuv6e}" ;;
    v5p-*) : "${version:=v2-alpha-tpuv5}" ;;
    v5litepod-*) : "${version:=v2-alpha-tpuv5-lite}" ;;
    *) : "${version:=tpu-ubuntu2204-base}" ;;
  esac
  local queue=(queued-resources create "$name" --node-id="$name" --runtime-version="$version")
  local command
  case ${CAPACITY:-on-demand} in
    on-demand) command=(tpu-vm create "$name" --version="$version") ;;
    queued) command=("${queue[@]}") ;;
    spot) command=("${queue[@]}" --spot) ;;
    *) fail "CAPACITY=$CAPACITY; give on-demand, queued or spot" ;;
  esac
  # shellcheck disable=SC2086 # OPTIONS are words
  gcloud compute tpus "${command[@]}" "${place[@]}" --accelerator-type="$TYPE" ${OPTIONS:-}
}

remove() {
  [[ $(describe queued-resources state.state) == MISSING ]] ||
    gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
  [[ $(describe tpu-vm state) == MISSING ]] ||
    gcloud compute tpus tpu-vm delete "$name" "${place[@]}" --quiet
}

create() {
  local now
  while now=$(state); [[ $now != READY ]]; do
    case $now in
      MISSING) request ;;
      PREEMPTED | TERMINATED | SUSPENDED) remove || sleep "${POLL:-30}" ;;
      FAILED) fail "$name: the request has failed; see its state in gcloud, then: $0 delete $name" ;;
      *)
        echo "$name: $now" >&2
        sleep "${POLL:-30}"
        ;;
    esac
  done
}

check() { (cd "$root" && check_command "$@"); }

# on WORKERS COMMAND: runs a command in a shell on hosts of the slice.
on() {
  gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --quiet --worker="$1" --command="$2" </dev/null
}

worker() { on "$1" "$folder/launch/tpu_worker.sh $2"; }

install() {
  local archive
  archive=$(mktemp -d)/$folder.tgz
  git -C "$root" ls-files -z | tar -C "$root" --null -T - -czf "$archive" &&
    gcloud compute tpus tpu-vm scp "$archive" "$name:$folder.tgz" "${place[@]}" --quiet --worker=all || return
  rm -r "${archive%/*}"
  on all "mkdir -p $folder && tar -xzf $folder.tgz -C $folder && $folder/launch/tpu_worker.sh install"
}

start() {
  local words
  (($#)) || fail "no command; such as: $0 run $name python -m condiff_jax.main ..."
  printf -v words ' %q' "$@" # quoted once more for the shell on the VM
  worker all "start$words"
}

# follow: returns the command's exit code, or 143 if it was stopped or the slice was lost.
follow() {
  local codes code
  until worker 0 log && codes=$(worker all wait); do
    case $(state) in
      READY | UNKNOWN) sleep "${POLL:-30}" ;; # only the connection was lost
      *) return 143 ;;
    esac
  done
  # If one host was stopped, the others fail.
  if grep -qx -e 143 -e lost <<<"$codes"; then return 143; fi
  while read -r code; do
    # Check for digits first: bash's arithmetic would run commands in other values.
    if [[ ! $code =~ ^(0|[1-9][0-9]{0,2})$ ]] || ((code > 255)); then
      printf 'error: tpu_vm.sh: %s: the exit code of a host is unreadable: %q\n' "$name" "$code" >&2
      return 2
    fi
    if [[ $code != 0 ]]; then return "$code"; fi
  done <<<"$codes"
}

up() {
  local code now
  [[ " $* " =~ \ --workdir[=\ ]gs:// ]] || fail "a slice that is lost loses its disks; give --workdir=gs://..."
  check "$@"
  while true; do
    create
    code=0
    # A command that is running already was started by an earlier call.
    { [[ $(worker 0 status 2>/dev/null) == running ]] || { install && start "$@"; }; } && follow || code=$?
    now=$(state) # if the slice is lost, any exit code is possible
    if ((code != 143)) && [[ $code == 0 || $now == READY || $now == UNKNOWN ]]; then break; fi
    echo "$name: stopped or lost; resuming" >&2
    sleep "${POLL:-30}"
  done
  if [[ -n ${DELETE:-} ]]; then remove; fi
  return "$code"
}

case $action in
  up) up "$@" ;;
  create) create ;;
  install) install ;;
  run)
    check "$@"
    start "$@"
    follow
    ;;
  follow) follow ;;
  stop) worker all stop ;;
  delete) remove ;;
  *) fail "no action '$action'; give up, create, install, run, follow, stop or delete" ;;
esac
