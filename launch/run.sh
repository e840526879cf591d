#!/bin/bash
# Runs a command with the compiler flags of a platform; the entry point of the images.
#
#   launch/run.sh gpu|tpu COMMAND...
set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/xla_flags.sh
. "$here/xla_flags.sh" "${1:-}"
# shellcheck source=launch/stoppable.sh
. "$here/stoppable.sh"
shift
stoppable "$@"
