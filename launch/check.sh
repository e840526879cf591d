# shellcheck shell=bash
# check_command COMMAND...: refuses a command whose config is wrong; for the project's folder.
#
# Modes train and evaluate are checked by mode summary, mode sweep by its dry run, on the CPU of
# this machine. Data and encoders may be elsewhere. Other modes and commands pass unchecked, and all
# with CHECK=0. PYTHON: the interpreter of this machine; the command's own if it is not set.

check_command() {
  local out more mode='--mode[= ](import|export|prepare|encode|reference|sample|summary|plan|report)'
  [[ ${CHECK:-1} != 0 && "${*:2:2}" == "-m condiff_jax.main" && ! " $* " =~ \ $mode\  ]] || return 0
  more=(--mode=summary)
  # A work directory without results to look for.
  [[ ! " $* " =~ \ --mode[=\ ]sweep\  ]] || more=(--dry_run --workdir=/nonexistent)
  # An encoder that is named by its hub id is fetched where it is used.
  out=$(JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 "${PYTHON:-$1}" "${@:2}" "${more[@]}" 2>&1 >/dev/null) && return
  out=${out##*$'\n'}
  if [[ $out != "error: "* ]]; then
    out="error: the command cannot be checked here ($out); pip install -e . in this folder, or set CHECK=0"
  fi
  echo "$out" >&2
  return 2
}
