#!/bin/sh
# Measure this machine's GPUs for a report to the project, in about 10 minutes: sh scripts/gpu_report.sh [--output DIR]
# No weights and no videos are needed. docs/contributing.md says how to send it in. DEVICE=cpu tries it on the CPU.
set -eu
CALLER=$PWD
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

PREVIOUS=
for argument in "$@"; do
    shift
    resolve_argument "$argument"
    set -- "$@" "$RESOLVED"
    PREVIOUS=$argument
done
given_python || complete_venv requirements.txt requirements-dev.txt
require_modules pytest
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # see scripts/launch.sh
exec "$PYTHON" -m benchmarks.gpu_report "$@"
