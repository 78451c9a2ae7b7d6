"""docs/publishing.md as a reader follows it: its commands, run in order on a small demo checkpoint, in this process."""

import contextlib
import importlib
import io
import re
import shlex

import pytest
from tiny import REPOSITORY, save_untrained

import test as test_program
from engine.certificate import OFFICIAL_VIDEOS
from tools.motion_demo import generate

PAGE = (REPOSITORY / "docs" / "publishing.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run(command):
    """What a command of the page prints."""
    _, program, *arguments = shlex.split(command)
    module = test_program if program == "test.py" else importlib.import_module(program[:-3].replace("/", "."))
    arguments += ["data.workers=0"] if program == "test.py" else []
    arguments += ["--workers", "0"] if program == "tools/predict.py" else []
    with contextlib.redirect_stdout(io.StringIO()) as output:
        module.main(arguments)
    return output.getvalue()


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(folder, what each command printed) after the whole page."""
    root = tmp_path_factory.mktemp("reader")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    generate(root / "demo_data" / "motion", train_videos=1, val_videos=7, size=64, num_frames=16)
    commands = [command for language, text in BLOCKS if language == "sh" for command in text.splitlines()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "exp_onehot" / "demo").mkdir(parents=True)
        save_untrained("configs/demo/motion.yaml", root / "exp_onehot" / "demo" / "model_best.pt")
        return root, [(command, run(command)) for command in commands]


def test_every_command_does_what_the_page_says(followed):
    root, printed = followed
    assert PAGE.count("```") == 2 * len(BLOCKS) and len(printed) == 6
    named = re.findall(r"^\| `([\w.]+)` \|", PAGE, re.MULTILINE)
    there = [path.name for path in (root / "published" / "motion").iterdir()]
    assert sorted([*there, "metrics.jsonl"]) == sorted(named)  # an untrained checkpoint has no rows
    assert "model.safetensors holds it" in printed[1][1] and "val_00000.mp4: 16 frames" in printed[2][1]
    assert "on 7 videos: top-1 " in printed[3][1]


def test_certify_prints_the_checks_that_the_page_explains(followed):
    _, printed = followed
    explained = re.findall(r"^\| ([\w ,]+) \| ", PAGE.partition("## 3.")[2].partition("## 4.")[0], re.MULTILINE)
    explained = {what.strip() for cell in explained for what in cell.split(",")} - {"check"}
    for _, output in printed[4:]:
        lines = [line for line in output.splitlines() if line[13:15] == "ok"]
        assert {line[:12].strip() for line in lines} == explained
    assert "No video is missing." in printed[4][1] and "193 of 200 videos are missing" in printed[5][1]


def test_the_page_names_the_numbers_of_the_published_lists():
    for number in OFFICIAL_VIDEOS.values():
        assert f"{number:,}" in PAGE
