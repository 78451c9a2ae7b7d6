"""docs/report.md as a reader follows it: its commands, run in order on a small demo checkpoint."""

import re

import numpy as np
import pages
import pytest

PAGE = "docs/report.md"


@pytest.fixture(scope="module")
def followed(reader):
    """(folder, what each command printed) after the whole page."""
    return reader, pages.follow(PAGE, reader)


def test_every_command_of_the_page_writes_what_the_page_says(followed):
    root, printed = followed
    assert len(printed) == 6
    report = root / "exp_onehot" / "demo" / "report"
    named = re.findall(r"^\| `(\w+\.(?:html|csv))` \|", pages.read(PAGE), re.MULTILINE)
    assert sorted(path.name for path in report.iterdir()) == sorted(named)
    assert printed[0][1].splitlines()[-2].endswith("report: exp_onehot/demo/report/report.html")
    assert all((root / name).is_file() for name in ("scores.npz", "fused.npz", "motion.csv", "look.png", "look.mp4"))
    scores, one, fused = (np.load(root / f"{name}.npz")["scores"] for name in ("scores", "one_view", "fused"))
    assert fused == pytest.approx(2 / 3 * scores + 1 / 3 * one, abs=1e-6)


def test_the_output_has_the_lines_that_the_page_explains(followed):
    comparison, motion = followed[1][2][1], followed[1][4][1]
    for words in (
        "9 videos in both",
        "top-1: ",
        "McNemar p = ",
        "frames: test_clips 2 -> 1",
        "pixels: test_crops 3 -> 1",
    ):
        assert words in comparison
    assert "verdict: what differs: frames, pixels" in comparison and "\n  weights:" not in comparison
    (shown,) = [block.text.splitlines() for block in pages.blocks(PAGE) if block.language == ""]
    for line in shown:
        assert line.split("top-1")[0] in motion
    assert "4 of 8 frames" in motion and "2 of 8 frames" in motion and "pair, " in motion
