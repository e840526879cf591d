# shellcheck shell=bash
# check_command COMMAND...: rejects a command whose config is wrong; run it in the project's folder.
#
# Mode summary checks modes train and evaluate, the dry run checks mode sweep, on the CPU of this
# machine. Data and encoders may be on other machines. Other modes and commands are not checked, and
# none with CHECK=0. PYTHON: the interpreter of this machine; by default the command's own.

check_command() {
  local out more mode='--mode[= ](import|export|prepare|encode|reference|sample|summary|plan|report)'
  [[ ${CHECK:-1} != 0 && "${*:2:2}" == "-m condiff_jax.main" && ! " $* " =~ \ $mode\  ]] || return 0
  more=(--mode=summary)
  # A work directory that has no results.
  [[ ! " $* " =~ \ --mode[=\ ]sweep\  ]] || more=(--dry_run --workdir=/nonexistent)
  # Encoders from the hub are downloaded where the command runs, not here.
  out=$(JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 "${PYTHON:-$1}" "${@:2}" "${more[@]}" 2>&1 >/dev/null) && return
  out=${out##*$'\n'}
  if [[ $out != "error: "* ]]; then
    out="error: the command cannot be checked here ($out); pip install -e . in this folder, or set CHECK=0"
  fi
  echo "$out" >&2
  return 2
}
