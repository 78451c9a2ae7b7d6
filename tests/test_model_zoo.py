"""docs/model_zoo.md: every configuration is in it, with the authors' number that it states, and its commands parse."""

import re
import shlex

import pytest
from tiny import REPOSITORY

import test as test_program
from engine.configuration import resolve_config
from modules.backbones import find_architecture
from tools import certify
from utils.config import load_config
from utils.errors import UserError

PAGE = (REPOSITORY / "docs" / "model_zoo.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| `configs/")
]
COMMANDS = [line for line in PAGE.splitlines() if line.startswith(("sh scripts/", "python tools/certify.py"))]
RUNS = sorted(
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "configs").rglob("*.yaml")
    if path.name not in ("base.yaml", "widths.yaml")  # the latter compares runs, and is no model
)


def test_every_configuration_has_one_row_and_its_two_commands():
    assert sorted(row[0].strip("`") for row in ROWS) == RUNS
    for path in RUNS:
        test, check = [command for command in COMMANDS if f" {path} " in command]
        assert test.startswith(f"sh scripts/run_test_vision.sh {path} CHECKPOINT ")
        assert check.startswith("python tools/certify.py ") and check.endswith(f" {path} --checkpoint CHECKPOINT")
        assert test.split()[-1] == check.split()[2]  # the score file


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`").replace("/", " "))
def test_a_row_says_what_its_configuration_says(row):
    path, tower, file, frames, views, authors, ours = row
    path = path.strip("`")
    config = resolve_config(load_config(REPOSITORY / path, purpose="model"))
    assert (tower, int(frames)) == (config.network.arch, config.data.num_segments)
    assert file.strip("`") == (find_architecture(tower).weight_file or file) and file
    header = (REPOSITORY / path).read_text(encoding="utf-8").partition("\n\n")[0]
    expected = re.search(r"To expect: (\d+\.\d) top-1", header)
    assert authors == (expected[1] if expected else "-")
    crops, clips = views.split(" x ")
    options = f"--test_crops {crops} --test_clips {clips}"
    assert options in next(command for command in COMMANDS if f" {path} CHECKPOINT" in command)
    assert path.startswith("configs/demo/") or options in header
    # A number of ours comes with its interval and its videos, as certify.py prints them.
    certified = r"\d+\.\d\d \(95 % interval \d+\.\d\d to \d+\.\d\d\), \d+ videos.*"
    assert ours == "not measured yet" or path.startswith("configs/demo/") or re.fullmatch(certified, ours)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[2].replace("/", " "))
def test_a_command_gets_as_far_as_the_data_that_is_not_here(command, tmp_path, monkeypatch):
    match shlex.split(command):
        case ["sh", "scripts/run_test_vision.sh", config, checkpoint, *rest]:
            main, arguments = test_program.main, ["--config", str(REPOSITORY / config), "--weights", checkpoint, *rest]
        case ["python", "tools/certify.py", scores, config, *rest]:
            main, arguments = certify.main, [scores, str(REPOSITORY / config), *rest]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="missing|no such file"):
        main(arguments)
