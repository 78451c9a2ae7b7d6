"""Names of frames: exactly those that the template gives."""

import os
from threading import Thread

import pytest

from datasets.annotations import VideoRecord
from datasets.frame_files import frame_pattern
from datasets.readers import FrameFolderReader
from utils.errors import DataError


@pytest.mark.parametrize(
    "template",
    [
        "img_{:05d}.jpg",
        "{}.png",
        "{:03d}",
        "f.{0:04d}.(a)+.jpg",
        "{:x}.jpg",
        "{:4d}.jpg",
        "{:,}.jpg",
        "{0:02d}_{0:03d}.jpg",
        "{:_>5d}.jpg",
        "{:*<6}.jpg",
        "{:->3}.jpg",
    ],
)
def test_a_frame_is_what_the_template_names_and_nothing_else(template):
    named = {template.format(number): number for number in range(20_000)}
    field = template[template.index("{") : template.rindex("}") + 1]
    others = {
        template.replace(field, other.format(number))
        for other in ("{}", "{:02d}", "{:05d}", "{:06d}", "{:X}", "+{}", "-{:04d}", " {}")
        for number in range(1000)
    }
    name = template.format(7)
    others |= {name.upper(), f"{name}\n", f"{name}.jpg", f"x{name}"}
    pattern = frame_pattern(template)
    for name in named.keys() | others:
        assert pattern.number(name) == named.get(name), name
        assert (pattern.fullmatch(name) is not None) == (name in named)


def test_the_reader_counts_no_frame_of_another_padding(make_frame_folders):
    root, _ = make_frame_folders([3], image_tmpl="img_{:05d}.jpg")
    folder = f"{root}/video 0"
    for number in (1, 2):
        with open(f"{folder}/img_{number:04d}.jpg", "wb") as file:
            file.write(b"x")
    reader = FrameFolderReader(root, "img_{:05d}.jpg", count_frames=True)
    assert reader.open(VideoRecord("video 0", 9, 0, "list:1")).num_frames == 3


def test_a_pipe_among_the_frames_is_an_error_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "img_00001.jpg")
    video = FrameFolderReader(str(tmp_path), "img_{:05d}.jpg").open(VideoRecord("", 1, 0, "list:1"))
    errors = []

    def read() -> None:
        with pytest.raises(DataError, match="img_00001.jpg: frame unreadable") as caught:
            video.read([0])
        errors.append(caught.value)

    thread = Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert len(errors) == 1
