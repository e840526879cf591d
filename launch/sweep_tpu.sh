#!/bin/bash
# Runs all rows of a table on several Cloud TPU VMs (of one host each), one shard of the sweep on each.
#
#   ZONE=us-central2-b launch/sweep_tpu.sh tpu-a,tpu-b --config=configs/table3.py \
#     --workdir=gs://BUCKET/table3 --scale=small
#
# Create the VMs with `launch/tpu_vm.sh create` and `install`. Their logs are written here as
# sweep-NAME.log. If a VM is lost, run the same command again; it resumes from the last checkpoints.
# PROJECT: gcloud's default if not set.
set -euo pipefail

if (($# < 2)) || [[ -z ${ZONE:-} ]]; then
  echo "error: usage: ZONE=... $0 NAME,NAME,... --config=configs/TABLE.py --workdir=gs://... [...]" >&2
  exit 2
fi
IFS=, read -ra names <<<"$1"
shift
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source=launch/check.sh
. "$root/launch/check.sh"
(cd "$root" && check_command python -m condiff_jax.main --mode=sweep "$@")

jobs=()
for index in "${!names[@]}"; do
  CHECK=0 "$root/launch/tpu_vm.sh" run "${names[index]}" \
    python -m condiff_jax.main --mode=sweep "$@" --shard="$index/${#names[@]}" >"sweep-${names[index]}.log" 2>&1 &
  jobs+=("$!")
done

failed=0
for index in "${!names[@]}"; do
  if wait "${jobs[index]}"; then
    echo "${names[index]}: done"
  else
    echo "error: ${names[index]}: see sweep-${names[index]}.log" >&2
    failed=1
  fi
done
exit "$failed"
