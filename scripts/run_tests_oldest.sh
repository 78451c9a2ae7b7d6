#!/bin/sh
# Run the tests with exactly the lower bounds of requirements.txt, in .venv-oldest (about 5 GB). Once per release.
#
# It takes python3.10, the oldest supported version, or python3 if there is none. Arguments go to run_tests.sh.
set -eu
CDPATH='' cd -- "$(dirname -- "$0")/.."
. scripts/environment.sh

interpreter=python3.10
is_python_3_10 "$interpreter" || interpreter=python3
is_python_3_10 "$interpreter" || fail "neither python3.10 nor python3 is Python 3.10 or newer"
PYTHON=$PWD/.venv-oldest/bin/python
pins=.venv-oldest/requirements.txt # written after the installation, so an equal copy means that they are installed

if ! lower_bounds requirements.txt | cat - requirements-dev.txt | cmp -s - "$pins"; then
    make_venv "$interpreter" .venv-oldest
    lower_bounds requirements.txt | cat - requirements-dev.txt >"$pins.new"
    "$PYTHON" -m pip install --disable-pip-version-check -r "$pins.new" ||
        fail "pip could not install the lower bounds of requirements.txt"
    mv "$pins.new" "$pins"
fi
export PYTHON
exec sh scripts/run_tests.sh "$@"
