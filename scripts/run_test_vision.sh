#!/bin/sh
# Test a checkpoint on all visible GPUs, or in one process on the CPU. See launch.sh and environment.sh for variables.
# Without CONFIG, the configuration in the checkpoint is taken.
set -eu
usage() {
    echo "usage: sh scripts/run_test_vision.sh CONFIG CHECKPOINT [--test_crops 1|3|5|10] [--test_clips N] [--dense]" \
        "[--save_scores FILE] [--report DIR] [--precision P] [--accept_changes] [key=value ...]; leave out CONFIG to" \
        "take the configuration in the checkpoint" >&2
    exit 2
}
case ${1:-} in '' | -*) usage ;; esac
case $1 in
*.yaml | *.yml) with_config=1 ;;
*) case ${2:-} in '' | -* | *=*) with_config= ;; *) with_config=1 ;; esac ;;
esac
if [ "$with_config" ]; then
    case ${2:-} in '' | -*) usage ;; esac
fi
CALLER=$PWD
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
. scripts/launch.sh

config=
if [ "$with_config" ]; then
    config=$(from_caller "$1")
    shift
fi
checkpoint=$(from_caller "$1")
shift
PREVIOUS=
for argument in "$@"; do
    shift
    resolve_argument "$argument"
    set -- "$@" "$RESOLVED"
    PREVIOUS=$argument
done
use_environment
[ -z "$config" ] || check_config test "$config" "$@"
launch test.py ${config:+--config "$config"} --weights "$checkpoint" "$@"
