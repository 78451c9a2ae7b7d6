# shellcheck shell=sh
# Sourced by the other scripts, from the repository root. Its two functions set PYTHON to the interpreter to use: the
# one that PYTHON names, else that of the active virtual environment, else that of .venv. Only .venv is installed into.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# make_environment FILE...: make, complete or update .venv to these requirements files, unless the user chose another.
make_environment() {
    given_python || complete_venv "$@"
    case $* in
    *requirements-dev.txt*) require_modules pytest ruff ;;
    *) require_modules ;;
    esac
}

# use_environment: install nothing; without .venv, python3 will do if it has what is needed.
use_environment() {
    if ! given_python; then
        PYTHON=$PWD/.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=python3
    fi
    require_modules
}

# True if the user chose an interpreter; .venv, activated, is none.
given_python() {
    if [ -z "${PYTHON:-}" ]; then
        case ${VIRTUAL_ENV:-} in '' | "$PWD/.venv") return 1 ;; esac
        PYTHON=$VIRTUAL_ENV/bin/python
    fi
}

complete_venv() {
    PYTHON=$PWD/.venv/bin/python
    if ! is_python_3_10 "$PYTHON"; then
        is_python_3_10 python3 || fail "python3 is not Python 3.10 or newer: make .venv with one that is, as in" \
            "python3.12 -m venv .venv"
        python3 -m venv --clear .venv || fail "python3 -m venv failed (on Debian and Ubuntu, install python3-venv)"
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip ||
        fail ".venv has no pip: delete .venv and start again"
    for file in "$@"; do
        # The copy in .venv is written last, so it tells that this very file is installed.
        cmp -s "$file" ".venv/$file" && continue
        printf 'Installing %s into .venv\n' "$file"
        "$PYTHON" -m pip install --disable-pip-version-check -r "$file" || fail "pip could not install $file"
        cp "$file" ".venv/$file" || exit
    done
}

is_python_3_10() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# require_modules [name ...]: PYTHON is new enough and has the modules the programs need, and these.
require_modules() {
    is_python_3_10 "$PYTHON" || fail "$PYTHON is not Python 3.10 or newer"
    missing=$(
        "$PYTHON" -c 'import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))' \
            torch torchvision timm numpy PIL simplejpeg numba yaml dotmap tqdm "$@"
    )
    [ -z "$missing" ] || fail "$PYTHON lacks $missing: install requirements.txt${1:+ and requirements-dev.txt} there," \
        "or run sh scripts/run_demo.sh with PYTHON unset and no environment active, which makes .venv"
}
