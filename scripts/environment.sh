# shellcheck shell=sh
# Functions that set PYTHON, the interpreter to use. The other scripts source this file from the repository root.
#
# PYTHON is the interpreter that the user names in PYTHON, otherwise that of the active virtual environment, otherwise
# that of .venv. Packages are installed into .venv only, never into an environment that the user chose.

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# make_environment FILE...: make .venv or bring it up to date with these requirements files. If the user chose another
# environment, only check that it has the modules.
make_environment() {
    given_python || complete_venv "$@"
    case $* in
    *requirements-dev.txt*) require_modules pytest ruff mypy ;;
    *) require_modules ;;
    esac
}

# use_environment: install nothing. Without .venv, take python3 if it has the modules.
use_environment() {
    if ! given_python; then
        PYTHON=$PWD/.venv/bin/python
        [ -x "$PYTHON" ] || PYTHON=python3
    fi
    require_modules
}

# True if the user chose an interpreter. An active .venv does not count as a choice.
given_python() {
    if [ -z "${PYTHON:-}" ]; then
        case ${VIRTUAL_ENV:-} in '' | "$PWD/.venv") return 1 ;; esac
        PYTHON=$VIRTUAL_ENV/bin/python
    fi
}

complete_venv() {
    PYTHON=$PWD/.venv/bin/python
    if ! is_python_3_10 "$PYTHON"; then
        is_python_3_10 python3 || fail "python3 is not Python 3.10 or newer: make .venv with a newer Python, for" \
            "example python3.12 -m venv .venv"
        make_venv python3 .venv
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip ||
        fail ".venv has no pip: delete .venv and start again"
    for file in "$@"; do
        # The copy in .venv is written after the installation, so an equal copy means that this file is installed.
        cmp -s "$file" ".venv/$file" && continue
        printf 'Installing %s into .venv\n' "$file"
        "$PYTHON" -m pip install --disable-pip-version-check -r "$file" || fail "pip could not install $file"
        cp "$file" ".venv/$file" || exit
    done
}

# make_venv INTERPRETER FOLDER: an empty virtual environment in FOLDER.
make_venv() {
    "$1" -m venv --clear "$2" || fail "$1 -m venv failed (on Debian and Ubuntu, install python3-venv)"
}

is_python_3_10() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# lower_bounds FILE: print a requirements file with each lower bound as the exact version.
lower_bounds() {
    sed -e 's/#.*//' -e '/^[[:space:]]*$/d' -e 's/>=/==/' "$1"
}

# require_modules [name ...]: fail unless PYTHON is new enough and has the modules of the programs and the named ones.
require_modules() {
    is_python_3_10 "$PYTHON" || fail "$PYTHON is not Python 3.10 or newer"
    missing=$(
        "$PYTHON" -c 'import importlib.util as u, sys; print(*(m for m in sys.argv[1:] if not u.find_spec(m)))' \
            torch torchvision timm numpy PIL simplejpeg numba yaml dotmap tqdm "$@"
    )
    [ -z "$missing" ] || fail "$PYTHON lacks $missing: install requirements.txt${1:+ and requirements-dev.txt} there," \
        "or run sh scripts/run_demo.sh with PYTHON unset and no environment active, which makes .venv"
}

# from_caller PATH: an existing path of the folder that the script was called from, made absolute; others stay as they are
# and are looked for in the repository root.
from_caller() {
    case $1 in /*) ;; *) if [ "$CALLER" != "$PWD" ] && [ -e "$CALLER/$1" ]; then
        printf '%s\n' "$CALLER/$1"
        return
    fi ;; esac
    printf '%s\n' "$1"
}

# Sets RESOLVED to the argument, whose path after --output, --save_scores, --report, resume= and the like is made absolute if the
# script was called from another folder than the repository root. PREVIOUS is the argument before it.
resolve_argument() {
    RESOLVED=$1
    [ "$CALLER" != "$PWD" ] || return 0
    case $PREVIOUS in
    --output | --save_scores | --report) RESOLVED=$CALLER/$1; case $1 in /*) RESOLVED=$1 ;; esac ;;
    *) case $1 in
        resume=auto | network.weights=hub) ;;
        resume=* | pretrain=* | network.weights=* | data.*_root=* | data.*_list=*)
            RESOLVED=${1%%=*}=$(from_caller "${1#*=}") ;;
        --output=* | --save_scores=* | --report=*) case ${1#*=} in /*) ;; *) RESOLVED=${1%%=*}=$CALLER/${1#*=} ;; esac ;;
        esac ;;
    esac
}
