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
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh
. scripts/launch.sh

use_environment
check_config train "$@"
launch train.py --config "$@"
