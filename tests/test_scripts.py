"""The shell scripts, run by sh with an interpreter that only reports how it is called."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.sh"))
INTERPRETER = r"""#!/bin/sh
case "$*" in
*device_count*) echo "$GPUS" ;;
*find_spec*) shift 2; for name; do [ "$name" != "${MISSING:-}" ] || echo "$name"; done ;;
-c*) ;;
*"-m ruff"* | *"-m mypy"* | *"-m pytest"*) printf '[%s]' "$@"; echo; exit "${CHECK_STATUS:-0}" ;;
*utils.config* | *tools.check_config*) printf '[%s]' "$@"; echo; exit "${CONFIG_STATUS:-0}" ;;
*) printf '[%s]' "$@"; echo; exit "${STATUS:-0}" ;;
esac
"""


@pytest.fixture
def call(tmp_path):
    """call(script, *arguments, **environment) -> the finished process; its interpreter prints arguments in brackets."""
    interpreter = tmp_path / "a folder" / "python"
    interpreter.parent.mkdir()
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    (tmp_path / "temporary").mkdir()

    def run(script: str, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        given = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path / "temporary"), "GPUS": "0"}
        given |= {"PYTHON": str(interpreter)} | environment
        command = ["sh", str(ROOT / "scripts" / script), *arguments]
        return subprocess.run(command, env=given, cwd=folder, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_posix_sh(script):
    subprocess.run(["sh", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("run_train_vision.sh", []),
        ("run_train_vision.sh", ["--output", "x"]),
        ("run_test_vision.sh", ["c.yaml"]),
        ("run_test_vision.sh", ["c.yaml", "--dense"]),
    ],
)
def test_wrong_number_of_arguments_shows_the_usage(call, script, arguments):
    done = call(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"usage: sh scripts/{script} CONFIG") and done.stderr.count("\n") == 1


def test_training_checks_the_overrides_and_passes_everything_on(call):
    done = call(
        "run_train_vision.sh", "my config.yaml", "--output", "out/lr=1", "solver.lr=1e-3", "data.train_root=a b"
    )
    check, launch = done.stdout.splitlines()
    assert check == "[-m][utils.config][train][my config.yaml][solver.lr=1e-3][data.train_root=a b]"
    assert launch == ("[train.py][--config][my config.yaml][--output][out/lr=1][solver.lr=1e-3][data.train_root=a b]")


def test_testing_checks_the_overrides_only(call):
    flags = [
        "--test_clips",
        "4",
        "--dense",
        "test.view_batch=2",
        "--save_scores",
        "a=b.npz",
        "--precision=fp32",
        "seed=1",
    ]
    check, launch = call("run_test_vision.sh", "c.yaml", "best.pt", *flags).stdout.splitlines()
    assert check == "[-m][utils.config][test][c.yaml][test.view_batch=2][seed=1]"
    assert launch.endswith("[test.py][--config][c.yaml][--weights][best.pt]" + "".join(f"[{flag}]" for flag in flags))


@pytest.mark.parametrize("arguments", [[], ["--dense"], ["data.val_list=a b.txt", "--accept_changes"]])
def test_testing_a_checkpoint_alone_takes_no_configuration_and_checks_none(call, arguments):
    (launch,) = call("run_test_vision.sh", "exp/lr=1/best.pt", *arguments).stdout.splitlines()
    assert launch == "[test.py][--weights][exp/lr=1/best.pt]" + "".join(f"[{argument}]" for argument in arguments)


@pytest.mark.parametrize("config, checkpoint", [("c.yaml", "lr=1.pt"), ("c.YAML", "best.pt"), ("dir/c", "best")])
def test_a_configuration_before_the_checkpoint_is_one_whatever_the_two_are_called(call, config, checkpoint):
    check, launch = call("run_test_vision.sh", config, checkpoint, "--accept_changes", "seed=1").stdout.splitlines()
    assert check == f"[-m][utils.config][test][{config}][seed=1]"
    assert launch == f"[test.py][--config][{config}][--weights][{checkpoint}][--accept_changes][seed=1]"


def test_bad_config_launches_nothing(call):
    done = call("run_train_vision.sh", "c.yaml", CONFIG_STATUS="1")
    assert done.returncode == 1 and "train.py" not in done.stdout


@pytest.mark.parametrize(
    ("environment", "flags"),
    [
        ({"GPUS": "4"}, "[4][--standalone]"),
        ({"GPUS": "4", "NUM_GPUS": "2"}, "[2][--standalone]"),
        ({"NUM_GPUS": "2"}, "[2][--standalone]"),
        ({"MASTER_PORT": "1234", "NUM_GPUS": "2"}, "[2][--master-addr][127.0.0.1][--master-port][1234]"),
        (
            {"GPUS": "8", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0"},
            "[8][--nnodes][2][--node-rank][1][--master-addr][node0][--master-port][29500]",
        ),
    ],
)
def test_processes_and_rendezvous_follow_the_environment(call, environment, flags):
    launch = call("run_train_vision.sh", "c.yaml", **environment).stdout.splitlines()[1]
    assert launch == f"[-m][utils.launch][--nproc-per-node]{flags}[train.py][--config][c.yaml]"


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"GPUS": "1", "NUM_GPUS": "2"}, "NUM_GPUS is 2, but 1 are visible"),
        ({"NUM_GPUS": "two"}, "NUM_GPUS must be a number from 1, got 'two'"),
        ({"NNODES": "0"}, "NNODES must be a number from 1, got '0'"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES is 2: set MASTER_ADDR to the address of node 0"),
        ({"NNODES": "2", "MASTER_ADDR": "node0"}, "NNODES is 2: set NODE_RANK, from 0 to 1"),
        ({"PYTHON": "/nowhere/python"}, "/nowhere/python is not Python 3.10 or newer"),
    ],
)
def test_environment_that_cannot_work_is_one_line(call, environment, problem):
    done = call("run_train_vision.sh", "c.yaml", **environment)
    assert (done.returncode, done.stderr) == (1, f"error: {problem}\n")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_status_of_the_processes_is_that_of_the_script(call, processes):
    assert call("run_train_vision.sh", "c.yaml", STATUS="3", NUM_GPUS=processes).returncode == 3
    assert call("run_train_vision.sh", "c.yaml", NUM_GPUS=processes).returncode == 0


EVERYTHING = ["[-m][ruff][check][.]", "[-m][ruff][format][--check][.]", "[-m][mypy]"]


def test_the_check_of_everything_lints_and_checks_the_types_of_all_code(call):
    assert call("run_tests.sh").stdout.splitlines() == [*EVERYTHING, "[-m][pytest][-q]"]
    flags = ["-m", "gpu", "--junitxml", "tests"]
    assert call("run_tests.sh", *flags).stdout.splitlines() == [
        *EVERYTHING,
        "[-m][pytest][-q][-m][gpu][--junitxml][tests]",
    ]


def test_the_check_of_named_test_files_lints_only_these_and_runs_no_type_checker(call):
    arguments = ["tests/test_seeding.py", "-k", "a b", "tests/test_config.py::test_base_none_means_no_base"]
    files = "[tests/test_seeding.py][tests/test_config.py]"
    assert call("run_tests.sh", *arguments).stdout.splitlines() == [
        f"[-m][ruff][check]{files}",
        f"[-m][ruff][format][--check]{files}",
        "[-m][pytest][-q]" + "".join(f"[{argument}]" for argument in arguments),
    ]


@pytest.mark.parametrize("module", ["pytest", "ruff", "mypy"])
def test_only_the_check_needs_the_development_tools(call, module):
    done = call("run_tests.sh", MISSING=module)
    assert done.returncode == 1 and done.stdout == ""
    assert f"lacks {module}: install requirements.txt and requirements-dev.txt there" in done.stderr
    assert call("run_train_vision.sh", "c.yaml", MISSING=module).returncode == 0


def test_a_failed_check_stops_before_the_tests(call):
    done = call("run_tests.sh", CHECK_STATUS="1")
    assert done.returncode == 1 and done.stdout.splitlines() == EVERYTHING[:1]


def requirements(text: str) -> list[Requirement]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [Requirement(line) for line in lines if line]


def test_the_lower_bounds_are_the_versions_that_requirements_begin_at():
    command = ["sh", "-c", ". scripts/environment.sh; lower_bounds requirements.txt"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    given = requirements((ROOT / "requirements.txt").read_text())
    pinned = requirements(printed)
    assert [(pin.name, pin.marker) for pin in pinned] == [(each.name, each.marker) for each in given]
    for pin, each in zip(pinned, given, strict=True):
        (lower,) = each.specifier
        (exact,) = pin.specifier
        assert (lower.operator, exact.operator, exact.version) == (">=", "==", lower.version)


OLD_PYTHON = r"""#!/bin/sh
case "$*" in
-c*) ;;
"-m venv --clear "*) rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo "new environment" ;;
*) printf '[%s]' "${0##*/}" "$@"; echo; exit "${PIP_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def oldest(tmp_path):
    """oldest(**environment) -> what run_tests_oldest.sh does in a copy of the repository's scripts and requirements."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in ("requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter = tmp_path / "bin" / "python3.10"
    interpreter.parent.mkdir()
    interpreter.write_text(OLD_PYTHON)
    interpreter.chmod(0o755)

    def run(**environment: str) -> subprocess.CompletedProcess:
        given = {"PATH": f"{interpreter.parent}:{os.environ['PATH']}", **environment}
        command = ["sh", "scripts/run_tests_oldest.sh", "-k", "x"]
        return subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True)

    return run


INSTALL = "[python][-m][pip][install][--disable-pip-version-check][-r][.venv-oldest/requirements.txt.new]"


def test_the_oldest_packages_are_installed_once_and_again_when_a_requirement_changes(oldest, tmp_path):
    tests = [f"[python]{line}" for line in (*EVERYTHING, "[-m][pytest][-q][-k][x]")]
    assert oldest().stdout.splitlines() == ["new environment", INSTALL, *tests]
    pins = requirements((tmp_path / ".venv-oldest/requirements.txt").read_text())
    assert {"torch", "pytest"} <= {pin.name for pin in pins}
    assert oldest(PYTHON="/nowhere/python", VIRTUAL_ENV="/nowhere").stdout.splitlines() == tests
    (tmp_path / "requirements.txt").write_text("numpy>=2.0\n")
    assert oldest().stdout.splitlines() == ["new environment", INSTALL, *tests]
    assert "numpy==2.0\n" in (tmp_path / ".venv-oldest/requirements.txt").read_text()


def test_an_installation_that_fails_is_an_error_and_is_tried_again(oldest):
    for _ in range(2):
        done = oldest(PIP_STATUS="1")
        assert (done.returncode, done.stdout.splitlines()) == (1, ["new environment", INSTALL])
        assert done.stderr == "error: pip could not install the lower bounds of requirements.txt\n"


@pytest.mark.parametrize(
    ("machine", "system", "decoder"),
    [
        ("x86_64", "linux", "decord"),
        ("AMD64", "win32", "decord"),
        ("aarch64", "linux", "decord2"),
        ("arm64", "darwin", "decord2"),
        ("x86_64", "darwin", "decord2"),
        ("ARM64", "win32", "decord2"),
    ],
)
def test_requirements_name_one_decord_for_every_machine(machine, system, decoder):
    environment = {"platform_machine": machine, "sys_platform": system}
    given = requirements((ROOT / "requirements.txt").read_text())
    wanted = [r.name for r in given if r.marker is None or r.marker.evaluate(environment)]
    assert [name for name in wanted if name.startswith("decord")] == [decoder]


def test_paths_are_those_of_the_folder_that_the_script_is_called_from(call, tmp_path):
    """What exists there, and what is to be written, is meant."""
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "last.pt").write_text("")
    arguments = ("mine.yaml", "--output", "out", "resume=last.pt")
    check, launch = call("run_train_vision.sh", *arguments, folder=tmp_path).stdout.splitlines()
    assert f"[{tmp_path}/mine.yaml]" in check
    assert launch.endswith(f"[{tmp_path}/mine.yaml][--output][{tmp_path}/out][resume={tmp_path}/last.pt]")
    arguments = ("configs/demo/motion.yaml", "last.pt", "--save_scores", "s.npz", "--report", "r", "--report=/r")
    launch = call("run_test_vision.sh", *arguments, folder=tmp_path).stdout
    assert f"[configs/demo/motion.yaml][--weights][{tmp_path}/last.pt][--save_scores][{tmp_path}/s.npz]" in launch
    assert f"[--report][{tmp_path}/r][--report=/r]" in launch
