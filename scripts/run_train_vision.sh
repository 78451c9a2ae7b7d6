#!/bin/sh
# Train one configuration on all visible GPUs, or in one process on the CPU. See launch.sh and environment.sh for
# variables.
set -eu
case ${1:-} in
'' | -*)
    echo "usage: sh scripts/run_train_vision.sh CONFIG [--output DIR] [key=value ...]" >&2
    exit 2
    ;;
esac
CALLER=$PWD
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
. scripts/launch.sh

config=$(from_caller "$1")
shift
PREVIOUS=
for argument in "$@"; do
    shift
    resolve_argument "$argument"
    set -- "$@" "$RESOLVED"
    PREVIOUS=$argument
done
use_environment
check_config train "$config" "$@"
launch train.py --config "$config" "$@"
