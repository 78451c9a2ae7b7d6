"""docs/report.md as a reader follows it: its commands, run in order on a small demo checkpoint.

The commands run in this process, without the scripts around them, which tests/test_scripts.py runs.
"""

import contextlib
import importlib
import io
import re
import shlex

import numpy as np
import pytest
from tiny import REPOSITORY, save_untrained

import test as test_program
from tools.motion_demo import generate

PAGE = (REPOSITORY / "docs" / "report.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run(command):
    """What a command of the page prints."""
    match shlex.split(command):
        case ["sh", "scripts/run_test_vision.sh", config, checkpoint, *rest]:
            main, arguments = test_program.main, ["--config", config, "--weights", checkpoint, *rest]
            arguments += ["data.workers=0"]
        case ["python", program, *arguments]:
            main = importlib.import_module(program.removesuffix(".py").replace("/", ".")).main
        case words:
            raise AssertionError(f"the page has another kind of command: {words}")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        main(arguments)
    return output.getvalue()


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """(folder, what each command printed) after the whole page."""
    root = tmp_path_factory.mktemp("reader")
    (root / "configs").symlink_to(REPOSITORY / "configs")
    generate(root / "demo_data" / "motion", train_videos=1, val_videos=9, size=64, num_frames=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        (root / "exp_onehot" / "demo").mkdir(parents=True)
        save_untrained("configs/demo/motion.yaml", root / "exp_onehot" / "demo" / "model_best.pt")
        texts = [text.replace("\\\n", " ") for language, text in BLOCKS if language == "sh"]
        return root, ["".join(run(command) for command in text.splitlines()) for text in texts]


def test_every_command_of_the_page_writes_what_the_page_says(followed):
    root, printed = followed
    assert PAGE.count("```") == 2 * len(BLOCKS) and len(printed) == 5
    report = root / "exp_onehot" / "demo" / "report"
    named = re.findall(r"^\| `(\w+\.(?:html|csv))` \|", PAGE, re.MULTILINE)
    assert sorted(path.name for path in report.iterdir()) == sorted(named)
    assert printed[0].splitlines()[-2].endswith("report: exp_onehot/demo/report/report.html")
    assert all((root / name).is_file() for name in ("scores.npz", "fused.npz", "motion.csv", "look.png", "look.mp4"))
    scores, one, fused = (np.load(root / f"{name}.npz")["scores"] for name in ("scores", "one_view", "fused"))
    assert fused == pytest.approx(2 / 3 * scores + 1 / 3 * one, abs=1e-6)


def test_the_output_has_the_lines_that_the_page_explains(followed):
    comparison, motion = followed[1][1], followed[1][3]
    for words in (
        "9 videos in both",
        "top-1: ",
        "McNemar p = ",
        "frames: test_clips 2 -> 1",
        "pixels: test_crops 3 -> 1",
    ):
        assert words in comparison
    assert "verdict: what differs: frames, pixels" in comparison and "\n  weights:" not in comparison
    (shown,) = [text.splitlines() for language, text in BLOCKS if language == ""]
    for line in shown:
        assert line.split("top-1")[0] in motion
    assert "4 of 8 frames" in motion and "2 of 8 frames" in motion and "pair, " in motion
