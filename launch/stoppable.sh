# shellcheck shell=bash
# stoppable COMMAND...: runs it, passes SIGTERM on to it and waits while it saves. Returns its exit
# code, or 143 if it was stopped: a stopped run ends with 0, like a finished one.

stoppable() {
  local status=0 child=
  stopped=
  # bash handles signals between commands only, so the command runs in the background.
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null || true' TERM
  "$@" &
  child=$!
  if [[ -n $stopped ]]; then kill -TERM "$child"; fi
  wait "$child" || status=$?
  while [[ -n $stopped ]] && kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # the signal ended the first `wait`, not the command
  done
  if [[ -n $stopped ]]; then status=143; fi
  return "$status"
}
