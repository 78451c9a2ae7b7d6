#!/bin/sh
# Say which class each video shows; see tools/predict.py and docs/prediction.md. Paths start at the caller's folder.
set -eu
case ${1:-} in
'' | -*)
    echo "usage: sh scripts/run_predict.sh CHECKPOINT PATH... [--topk 5] [--crops 1|3|5|10] [--clips N]" \
        "[--json FILE] [--csv FILE] [--overlay OUT.mp4] [--workers N] [--set KEY=VALUE]" \
        "[--window SECONDS [--stride SECONDS] [--plot OUT.png] [--live] [--reopen N]]" >&2
    exit 2
    ;;
esac
caller=$PWD
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

use_environment
root=$PWD
cd -- "$caller"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # see scripts/launch.sh
exec "$PYTHON" "$root/tools/predict.py" "$@"
