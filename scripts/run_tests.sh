#!/bin/sh
# Linter, formatter and tests; arguments go to pytest.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

make_environment requirements.txt requirements-dev.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" "$PYTHON" -m pytest -q "$@" # see scripts/launch.sh
