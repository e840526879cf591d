# shellcheck shell=bash
# Shared by the Slurm jobs; sourced from the project's folder, where they are submitted.

# shellcheck source=launch/xla_flags.sh
. launch/xla_flags.sh gpu
# shellcheck source=launch/stoppable.sh
. launch/stoppable.sh
# shellcheck source=launch/check.sh
. launch/check.sh

# count NAME DEFAULT: the value of a variable if it is a number. bash's arithmetic would run commands
# in other values.
count() {
  local value=${!1:-$2}
  if [[ ! $value =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
    printf 'error: %s=%q is not a number\n' "$1" "$value" >&2
    return 2
  fi
  echo "$value"
}

# requeued COMMAND...: runs it; if it was stopped, requeues this job.
requeued() {
  local status=0 job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
  stoppable "$@" || status=$?
  if [[ -z $stopped ]]; then return "$status"; fi
  # Slurm requeues preempted jobs itself, but not those that are out of time. A job that scancel has
  # stopped is no longer RUNNING and is not requeued.
  if [[ $(squeue --noheader --jobs="$job" --format=%T) == RUNNING ]]; then
    scontrol requeue "$job" || true
  fi
}
