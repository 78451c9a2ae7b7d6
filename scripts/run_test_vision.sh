#!/bin/sh
# Test a checkpoint on all visible GPUs, or in one process on the CPU. See launch.sh and environment.sh for variables.
set -eu
usage() {
    echo "usage: sh scripts/run_test_vision.sh CONFIG CHECKPOINT [--test_crops 1|3|5|10] [--test_clips N] [--dense]" \
        "[--save_scores FILE] [--report DIR] [--precision P] [key=value ...]" >&2
    exit 2
}
case ${1:-} in '' | -*) usage ;; esac
case ${2:-} in '' | -*) usage ;; esac
CALLER=$PWD
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
. scripts/launch.sh

config=$(from_caller "$1") checkpoint=$(from_caller "$2")
shift 2
PREVIOUS=
for argument in "$@"; do
    shift
    resolve_argument "$argument"
    set -- "$@" "$RESOLVED"
    PREVIOUS=$argument
done
use_environment
check_config test "$config" "$@"
launch test.py --config "$config" --weights "$checkpoint" "$@"
