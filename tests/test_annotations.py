"""Annotation lists and class lists: what they give, and the errors that name file and line."""

import pickle

import numpy as np
import pytest

from datasets.annotations import VideoRecord, few_shot, read_annotations, read_class_names
from utils.errors import DataError


@pytest.fixture
def write(tmp_path):
    def write_text(text, encoding="utf-8"):
        path = tmp_path / "list.txt"
        path.write_bytes(text.encode(encoding))
        return str(path)

    return write_text


def test_columns_are_split_from_the_right_so_paths_may_contain_spaces(write):
    path = write("a/b 12 0\n\nmy  video folder 3 1\n\t \ntabs\there\t7\t2\r\nlast 1 2")
    assert read_annotations(path, 3) == [
        VideoRecord("a/b", 12, 0, f"{path}:1"),
        VideoRecord("my  video folder", 3, 1, f"{path}:3"),
        VideoRecord("tabs\there", 7, 2, f"{path}:5"),
        VideoRecord("last", 1, 2, f"{path}:6"),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_path(write):
    assert read_annotations(write("\ufeffclip 4 0\n"), 1)[0].path == "clip"


def test_records_can_be_sent_to_other_processes():
    record = VideoRecord("a b", 3, 1, "list.txt:4")
    assert pickle.loads(pickle.dumps(record)) == record


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("clip 3", "must read 'path num_frames label', got 'clip 3'"),
        ("my clip.mp4 3", "num_frames must be an integer of at least 1, got 'clip.mp4'"),
        ("clip 3.0 1", "num_frames must be an integer of at least 1, got '3.0'"),
        ("clip 0 1", "num_frames must be an integer of at least 1, got '0'"),
        ("clip 3 x", "label (data.num_classes is 4) must be an integer in 0..3, got 'x' in the line 'clip 3 x'"),
        ("clip 3 4", "label (data.num_classes is 4) must be an integer in 0..3, got '4'"),
        ("clip 3 -1", "label -1 means unlabelled, but training and validation need labels"),
        ("clip.mp4 3", "got 'clip.mp4 3'; a list of video files ('path label') needs data.modality: video"),
        ("my clip.mp4 3", "got 'clip.mp4'; a list of video files ('path label') needs data.modality: video"),
        ("cl\0ip 3 1", "the line holds a NUL character"),
        ("clip 3 -2", "must be an integer in 0..3, got '-2'"),
    ],
)
def test_a_bad_line_is_named_with_file_and_line(write, line, message):
    path = write(f"good 3 1\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_annotations(path, 4)
    assert caught.value.line.startswith(f"{path}:3: ")
    assert message in caught.value.line
    assert "\n" not in str(caught.value)


def test_lines_of_video_files_have_no_number_of_frames(write):
    path = write("a/my clip 12.mp4 0\nb.webm 1\n")
    assert read_annotations(path, 2, "video") == [
        VideoRecord("a/my clip 12.mp4", None, 0, f"{path}:1"),
        VideoRecord("b.webm", None, 1, f"{path}:2"),
    ]
    with pytest.raises(DataError, match=r"list.txt:1: a line must read 'path label', got 'alone.mp4'"):
        read_annotations(write("alone.mp4\n"), 2, "video")


def test_a_list_may_be_unlabelled_as_a_whole(write):
    path = write("a 3 -1\nb 4 -1\n")
    assert [record.label for record in read_annotations(path, 2, unlabelled=True)] == [-1, -1]
    assert read_annotations(write("a 3 1\n"), 2, unlabelled=True)[0].label == 1


@pytest.mark.parametrize("text", ["a 3 -1\nb 3 -1\nc 3 1\n", "a 3 1\nb 3 0\nc 3 -1\n"])
def test_labels_in_some_lines_only_are_an_error_of_the_first_odd_line(write, text):
    path = write(text)
    with pytest.raises(DataError, match="in a list whose first is -?1; label all or none") as caught:
        read_annotations(path, 2, unlabelled=True)
    assert caught.value.line.startswith(f"{path}:3: ")


def test_few_shot_takes_the_given_number_of_each_class_in_list_order():
    records = [VideoRecord(str(i), 1, i % 3, f"list.txt:{i + 1}") for i in range(30)]
    names = ["a", "b", "c"]
    seen = set()
    for seed in range(20):
        chosen = few_shot(records, 4, names, np.random.default_rng(seed))
        assert np.bincount([record.label for record in chosen]).tolist() == [4, 4, 4]
        assert chosen == sorted(chosen, key=records.index)
        seen |= {record.path for record in chosen}
    assert len(seen) == 30  # every video can be chosen
    assert few_shot(records, 10, names, np.random.default_rng(0)) == records


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_an_empty_list_is_an_error(write, text):
    path = write(text)
    with pytest.raises(DataError, match="the list is empty") as caught:
        read_annotations(path, 4)
    assert caught.value.line.startswith(path)


def test_a_list_that_cannot_be_read_is_named(write, tmp_path):
    with pytest.raises(DataError, match=r"none\.txt: cannot be read"):
        read_annotations(str(tmp_path / "none.txt"), 4)
    with pytest.raises(DataError, match=r"list\.txt: cannot be read as UTF-8"):
        read_annotations(write("caf\u00e9 3 1\n", "latin-1"), 4)


def test_class_names_come_in_label_order_whatever_the_order_of_the_file(write):
    path = write('id,name\n2,Moving something left\n\n0, Drop \n1,"Push, then pull"\n')
    assert read_class_names(path, 3) == ["Drop", "Push, then pull", "Moving something left"]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", ":1: ", "header must read 'id,name'"),
        ("0,a\n1,b\n", ":1: ", "header must read 'id,name', got '0,a'"),
        ("id,name\n0,a\n1,b,c\n", ":3: ", "got '1,b,c'"),
        ("id,name\n0,a\nb,b\n", ":3: ", "id (data.num_classes is 2) must be an integer in 0..1, got 'b'"),
        ("id,name\n0,a\n\n2,b\n", ":4: ", "must be an integer in 0..1, got '2'"),
        ("id,name\n0,a\n0,b\n", ":3: ", "id 0 is there twice"),
        ("id,name\n0,a\n1,a\n", ":3: ", "unique, got 'a'"),
        ("id,name\n0,a\n1,\n", ":3: ", "unique, got ''"),
        ("id,name\n0," + "a" * 140_000 + "\n", ":2: ", "the line is longer than"),
        ("id,name\n1,a\n", ": ", "ids must be 0..1, but 0 is missing"),
    ],
)
def test_a_bad_class_list_is_named_with_file_and_line(write, text, place, message):
    path = write(text)
    with pytest.raises(DataError) as caught:
        read_class_names(path, 2)
    assert caught.value.line.startswith(path + place)
    assert message in caught.value.line
