#!/bin/sh
# Run the linter, the formatter, the type checker and the tests. All arguments go to pytest.
#
# sh scripts/run_tests.sh                        everything
# sh scripts/run_tests.sh -m gpu                 all checks of the code, and the tests that need a GPU
# sh scripts/run_tests.sh tests/test_config.py   lint and run these test files only
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

# check_code [argument ...]: check the test files among the arguments, or all code if there are none.
check_code() {
    for argument in "$@"; do
        shift
        file=${argument%%::*}
        case $file in *.py) [ ! -f "$file" ] || set -- "$@" "$file" ;; esac
    done
    if [ $# -gt 0 ]; then
        lint "$@"
    else
        lint .
        "$PYTHON" -m mypy
    fi
}

lint() {
    "$PYTHON" -m ruff check "$@"
    "$PYTHON" -m ruff format --check "$@"
}

make_environment requirements.txt requirements-dev.txt
check_code "$@"
OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" "$PYTHON" -m pytest -q "$@" # launch.sh says why
