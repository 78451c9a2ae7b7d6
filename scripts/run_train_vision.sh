#!/bin/sh
# Train one config on every visible GPU, or in one CPU process; see launch.sh and environment.sh.
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
