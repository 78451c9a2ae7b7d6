"""The animated strip of predictions shows what entered the model, in order, with the model's own answer."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from datasets.sampling import sample_test
from inference.page import Answer
from tools import draw_predictions
from utils.errors import ConfigError, DataError

CELL, TEXT, GAP = draw_predictions.CELL, draw_predictions.TEXT, draw_predictions.GAP


def frames_of(path):
    with Image.open(path) as strip:
        for number in range(strip.n_frames):
            strip.seek(number)
            yield np.asarray(strip.convert("RGB")).astype(int)


def test_every_cell_shows_the_frames_that_the_model_saw(recognizer, checkpoint, motion_root, tmp_path, capsys):
    videos = [str(motion_root / "frames" / f"val_0000{number}") for number in range(3)]
    out = tmp_path / "strip.gif"
    draw_predictions.main([str(checkpoint), *videos, "--out", str(out), "--columns", "2"])
    shown = list(frames_of(out))
    data = recognizer.config.data
    assert len(shown) == data.num_segments == 4
    assert shown[0].shape == (2 * (CELL + TEXT), 2 * CELL + GAP, 3)
    indices = sample_test(6, data.num_segments, data.protocol)[0]
    assert len(set(indices.tolist())) == 4
    for place, video in enumerate(videos):
        left, top = place % 2 * (CELL + GAP), place // 2 * (CELL + TEXT)
        cells = [picture[top : top + CELL, left : left + CELL] for picture in shown]
        for moment, cell in enumerate(cells):
            apart = []
            for index in indices.tolist():
                with Image.open(f"{video}/img_{index + 1:05d}.jpg") as frame:
                    wanted = np.asarray(frame.resize((CELL, CELL), Image.Resampling.BICUBIC)).astype(int)
                apart.append(np.abs(wanted - cell).mean())
            assert np.argmin(apart) == moment and apart[moment] < 12, "few colours, and the pixels of a JPEG"
    printed = capsys.readouterr().out.splitlines()
    for video, line in zip(videos, printed, strict=False):
        ((name, score),) = recognizer.predict(video, topk=1)
        assert line == f"{video}: {name}, {100 * score:.1f} %"


def test_a_cell_has_text_for_its_own_video_only():
    pixels = np.zeros((2, 8, 8, 3), np.uint8)
    answers = [Answer(2, [(name, 0.5)], [0, 1], pixels) for name in ("left", "", "a name that is much too long for it")]
    sheet = np.asarray(draw_predictions.draw_strip(answers, 3)[0])
    below = sheet[CELL : CELL + 18, :, 0]
    dark = [int((below[:, i * (CELL + GAP) : i * (CELL + GAP) + CELL] < 128).sum()) for i in range(3)]
    assert dark[1] == 0 < dark[0] < dark[2]
    assert (below[:, CELL : CELL + GAP] == 255).all()


def test_names_are_cut_to_the_width_of_a_cell():
    font = ImageFont.load_default(size=14)
    assert draw_predictions.fitting("growing", font) == "growing"
    cut = draw_predictions.fitting("putting something on a surface", font)
    assert cut.endswith("...") and font.getlength(cut) <= CELL and cut.startswith("putting")


def test_what_does_not_change_has_the_same_colour_in_every_frame():
    rng = np.random.default_rng(0)
    still, moving = rng.integers(0, 256, (20, 30, 3)), rng.integers(0, 256, (4, 20, 30, 3))
    pictures = [Image.fromarray(np.concatenate([still, frame]).astype(np.uint8)) for frame in moving]
    few = [np.asarray(picture.convert("RGB"))[:20] for picture in draw_predictions.in_few_colours(pictures)]
    assert all(np.array_equal(few[0], other) for other in few)


@pytest.mark.parametrize(
    "arguments, error, line",
    [
        (["--out", "strip.png"], ConfigError, "--out strip.png: must end in .gif"),
        (["--out", "strip.gif", "--columns", "0"], ConfigError, "--columns 0: must be at least 1"),
        (["--out", "strip.gif"], DataError, "gone.mp4: no such file or folder"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_and_writes_nothing(checkpoint, tmp_path, monkeypatch, arguments, error, line):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=line):
        draw_predictions.main([str(checkpoint), "gone.mp4", *arguments])
    assert sorted(tmp_path.iterdir()) == before
