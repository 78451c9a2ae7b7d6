"""tools/check_data.py: a clean data set has no findings, and every fault is reported at its line."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import spoil_packets, write_packets, write_video

from datasets.annotations import VideoRecord, read_annotations
from tools import check_videos, prepare_data
from tools.check_data import PRINTED, main
from tools.check_videos import Task, check_frame_folder
from utils.errors import DataError, UserError

REPOSITORY = Path(__file__).parents[1]
NAMES = ("fall down", "jump", "turn left", "turn right")
FRAMES = 4
VIDEO_SIZE = (128, 96)  # decord refuses some smaller widths


def write_frames(folder: Path, seed: int, numbers=range(1, FRAMES + 1), size=(24, 16)) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        coarse = np.random.default_rng((seed, number)).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
        picture.save(folder / f"img_{number:05d}.jpg", quality=90)


class DataSet:
    """Eight training and four validation videos of four classes. `check` returns status, findings and output."""

    def __init__(self, root: Path, capsys, modality: str):
        self.root, self.capsys = root, capsys
        self.lists = {part: root / f"{part}.txt" for part in ("train", "val")}
        self.lines: dict[str, list[str]] = {}
        for part, count in (("train", 8), ("val", 4)):
            self.lines[part] = []
            for i in range(count):
                name, seed = f"{part} {i}", 100 * (part == "val") + i
                if modality == "video":
                    write_video(root / "media" / f"{name}.mp4", seed, FRAMES, VIDEO_SIZE)
                    self.lines[part].append(f"{name}.mp4 {i % 4}")
                else:
                    write_frames(root / "media" / name, seed)
                    self.lines[part].append(f"{name} {FRAMES} {i % 4}")
        (root / "classes.csv").write_text("id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(NAMES)))
        self.data = {"dataset": "mine", "batch_size": 2, "num_classes": 4, "label_list": str(root / "classes.csv")}
        self.data["modality"] = modality
        for part, path in self.lists.items():
            self.data |= {f"{part}_root": str(root / "media"), f"{part}_list": str(path)}

    @property
    def media(self) -> Path:
        return self.root / "media"

    def write(self) -> str:
        for part, lines in self.lines.items():
            self.lists[part].write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        config = {"data": self.data, "network": {"arch": "timm/vit_tiny_patch16_224", "side_dim": 64}}
        path = self.root / "config.yaml"
        path.write_text(yaml.safe_dump({**config, "solver": {"epochs": 1, "lr": 1e-3}}))
        return str(path)

    def check(self, *arguments, workers: int = 0) -> tuple[int, list[dict], str]:
        report, status = self.root / "report.json", 0
        try:
            main([self.write(), *map(str, arguments), "--workers", str(workers), "--json", str(report)])
        except DataError as error:
            status = 1
            assert "\n" not in str(error) and "its data have" in error.line
        output = self.capsys.readouterr().out
        content = json.loads(report.read_text())
        for severity in ("error", "warning"):
            assert content[f"{severity}s"] == sum(f["severity"] == severity for f in content["findings"])
        assert status == (content["errors"] > 0)
        return status, content["findings"], output

    def only_finding(self, part: str, line: int | None, severity: str, kind: str, *arguments) -> str:
        """Assert that there is one finding, at this line of this list, and return its message."""
        status, findings, output = self.check(*arguments)
        assert [(f["severity"], f["kind"]) for f in findings] == [(severity, kind)], findings
        place = f"{self.lists[part]}:{line}" if line else str(self.lists[part])
        assert findings[0]["place"] == place and status == (severity == "error")
        assert f"{place}: {severity}: {findings[0]['message']}\n" in output
        return findings[0]["message"]


@pytest.fixture
def frames(tmp_path, capsys):
    return DataSet(tmp_path, capsys, "RGB")


@pytest.fixture
def videos(tmp_path, capsys):
    return DataSet(tmp_path, capsys, "video")


def test_a_clean_data_set_has_no_findings(frames, tmp_path):
    status, findings, output = frames.check()
    assert (status, findings) == (0, [])
    assert f"{tmp_path / 'train.txt'}: 8 lines, 0 places with errors" in output and "0 errors, 0 warnings" in output


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_clean_video_files_have_no_findings(videos, decoder):
    assert videos.check(f"data.decoder={decoder}")[:2] == (0, [])


def test_processes_find_what_one_finds(frames):
    shutil.rmtree(frames.media / "train 1")
    (frames.media / "train 5" / "img_00002.jpg").write_bytes(b"")
    frames.lines["val"][2] += " x"
    alone, together = frames.check(), frames.check(workers=2)
    assert alone == together and len(alone[1]) == 4


# Lines


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("alone", "a line must read 'path num_frames label', got 'alone'"),
        (f"train 5 {FRAMES} four", "label (data.num_classes is 4) must be an integer in 0..3, got 'four'"),
        (f"train 5 {FRAMES} 4", "label (data.num_classes is 4) must be an integer in 0..3, got '4'"),
        ("train 5 0 1", "num_frames must be an integer of at least 1, got '0'"),
        (f"train 5 {FRAMES} -1", "label -1 means unlabelled, but training and validation need labels"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_hides_no_other(frames, line, message):
    frames.lines["train"][5] = line
    frames.lines["train"].insert(2, "")
    assert message in frames.only_finding("train", 7, "error", "line")
    frames.lines["train"].append("another")
    _, findings, _ = frames.check()
    assert [finding["place"].rpartition(":")[2] for finding in findings] == ["7", "10"]


def test_a_path_listed_twice_is_an_error_of_the_second_line(frames):
    frames.lines["train"].append(f"./train 2 {FRAMES} 2")
    message = frames.only_finding("train", 9, "error", "duplicate")
    assert message.endswith(f"listed before, at {frames.lists['train']}:3")
    frames.lines["train"][8] = f"train 2 {FRAMES} 3"
    assert "with another label, 2, at" in frames.only_finding("train", 9, "error", "duplicate")


def test_a_path_in_both_lists_is_an_error_of_the_training_list(frames):
    frames.lines["train"].append(f"val 1 {FRAMES} 1")
    message = frames.only_finding("train", 9, "error", "overlap")
    assert message == f"val 1: is a validation video too, at {frames.lists['val']}:2"


def test_the_same_content_under_another_name_is_a_warning(frames):
    shutil.copytree(frames.media / "val 1", frames.media / "copy")
    frames.lines["train"].append(f"copy {FRAMES} 1")
    message = frames.only_finding("train", 9, "warning", "content")
    assert message == f"copy: has the same content as val 1, at {frames.lists['val']}:2"


def test_folders_with_findings_are_not_compared(frames):
    shutil.copytree(frames.media / "val 1", frames.media / "copy")
    frames.lines["train"].append(f"copy {FRAMES - 1} 1")
    frames.lines["val"][1] = f"val 1 {FRAMES - 1} 1"  # both count fewer frames than there are
    assert [finding["kind"] for finding in frames.check()[1]] == ["count", "count"]


def test_a_list_without_labels_is_a_warning_in_validation(frames):
    frames.lines["val"] = [line[:-1] + "-1" for line in frames.lines["val"]]
    assert "no line has a label" in frames.only_finding("val", None, "warning", "list")
    frames.lines["val"][2] = f"val 2 {FRAMES} 2"
    _, findings, _ = frames.check()
    places = {finding["place"].rpartition("/")[2] for finding in findings if finding["kind"] == "line"}
    assert places == {"val.txt:1", "val.txt:2", "val.txt:4"}


def test_a_training_list_without_labels_is_an_error_of_every_line(frames):
    frames.lines["train"] = [line[:-1] + "-1" for line in frames.lines["train"]]
    _, findings, _ = frames.check()
    assert [finding["place"].rpartition(":")[2] for finding in findings] == [str(line) for line in range(1, 9)]
    assert {finding["kind"] for finding in findings} == {"line"}


@pytest.mark.parametrize(
    ("content", "complaint"), [(b"", "the list is empty"), (b"caf\xe9 3 1\n", "cannot be read as")]
)
def test_a_list_that_gives_nothing_is_an_error_and_the_other_is_read(frames, content, complaint, tmp_path):
    frames.lines["train"][0] = "bad"
    config = frames.write()
    frames.lists["val"].write_bytes(content)
    with pytest.raises(DataError, match="2 errors"):
        main([config, "--workers", "0", "--clean", str(tmp_path / "clean")])
    output = frames.capsys.readouterr().out
    assert f"val.txt: error: {complaint}" in output and "train.txt:1: error" in output
    assert [path.name for path in (tmp_path / "clean").iterdir()] == ["train.txt"]


# Classes


def test_folders_of_classes_that_differ_in_case_only_are_no_finding(frames):
    set_names(frames, "jump", "Jump", "jump_", "x")
    for label, folder in enumerate(("jump", "Jump", "jump_")):
        (frames.media / folder).mkdir()
        shutil.move(frames.media / f"train {label}", frames.media / folder / "1")
        frames.lines["train"][label] = f"{folder}/1 {FRAMES} {label}"
    assert frames.check()[:2] == (0, [])


def test_a_class_without_training_videos_is_an_error(frames):
    frames.lines["train"] = [line for line in frames.lines["train"] if not line.endswith("2")]
    message = frames.only_finding("train", None, "error", "class")
    assert message == "no training video is of class 2 ('turn left'); check data.num_classes"


def test_a_class_without_validation_videos_is_a_warning(frames):
    frames.lines["val"].pop()
    assert "no validation video is of class 3" in frames.only_finding("val", None, "warning", "class")


def test_a_folder_named_like_another_class_is_a_warning(frames):
    shutil.move(frames.media / "train 3", frames.media / "Fall_down" / "x")
    frames.lines["train"][3] = f"Fall_down/x {FRAMES} 3"
    message = frames.only_finding("train", 4, "warning", "folder")
    assert message == "Fall_down/x: label 3 is 'turn right', but the folder is named like label 0"
    frames.lines["train"][3] = f"Fall_down/x {FRAMES} 0"
    frames.lines["train"][0] = f"train 0 {FRAMES} 3"
    assert frames.check()[:2] == (0, [])


def set_names(frames, *names):
    """Replace the class names and return the place of findings about them."""
    path = frames.root / "classes.csv"
    path.write_text("id,name\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    return str(path)


def test_a_name_whose_mirror_is_no_class_is_a_warning(frames):
    place = set_names(frames, "fall down", "jump", "turn left", "turn Right")
    status, findings, _ = frames.check()
    assert status == 0 and [f["place"] for f in findings] == [place, place]
    assert findings[0]["message"].startswith("class 2: the mirror of 'turn left' is no class ('turn right')")
    assert {f["kind"] for f in findings} == {"flip"}
    assert frames.check("data.flip=False")[:2] == (0, [])


def test_classes_whose_names_suggest_a_side_without_a_partner_are_named(frames):
    set_names(frames, "TurnLeft", "TurnRight", "spin clockwise", "spin anti-clockwise")
    _, findings, _ = frames.check()
    assert [(f["kind"], f["message"].split(" in a word")[0]) for f in findings] == [
        ("flip", f"class {label}: {name!r} suggests a side") for label, name in enumerate(("TurnLeft", "TurnRight"))
    ]


def test_something_out_of_alphabetical_order_is_a_warning(frames):
    place = set_names(frames, "jump", "fall down", "turn left", "turn right")
    assert frames.check()[:2] == (0, [])
    status, findings, _ = frames.check("data.dataset=something-something-v2")
    assert status == 0 and [(f["kind"], f["place"]) for f in findings] == [("order", place)]
    assert "class 0 is 'jump', not 'fall down'" in findings[0]["message"]


def test_a_configuration_for_tests_needs_no_training_videos_and_no_labels_of_flips(frames):
    del frames.data["train_list"], frames.data["train_root"]
    frames.data |= {"label_list": None, "protocol": "something"}  # training would need names, to flip
    status, findings, output = frames.check()
    assert (status, findings) == (0, []) and "config.yaml: no data.train_list: checked for test.py only\n" in output
    frames.lines["val"][1] = f"nothing {FRAMES} 1"
    assert frames.only_finding("val", 2, "error", "missing").endswith("nothing: No such file or directory")


def test_something_without_names_is_an_error_unless_it_has_174_classes(frames):
    frames.data |= {"label_list": None, "protocol": "something"}
    status, findings, _ = frames.check()
    assert status == 1 and [(f["severity"], f["kind"]) for f in findings] == [("error", "flip")]
    assert findings[0]["place"] == str(frames.root / "config.yaml") and "174" in findings[0]["message"]
    status, findings, _ = frames.check("data.num_classes=174")
    assert [(f["severity"], f["kind"]) for f in findings if f["kind"] != "class"] == [("warning", "flip")]
    assert len([f for f in findings if f["kind"] == "class"]) == 2 * 170


def test_bad_names_are_named_with_their_line(frames):
    (frames.root / "classes.csv").write_text("id,name\n0,a\n1,b\n1,c\n3,d\n")
    status, findings, _ = frames.check()
    assert status == 1 and len(findings) == 1
    assert (findings[0]["place"], findings[0]["message"]) == (f"{frames.root}/classes.csv:4", "id 1 is there twice")


# Folders of frames


def test_a_folder_that_is_missing(frames):
    shutil.rmtree(frames.media / "train 6")
    assert frames.only_finding("train", 7, "error", "missing").endswith("train 6: No such file or directory")


def test_a_folder_without_frames_of_that_name(frames):
    for path in (frames.media / "val 0").iterdir():
        path.rename(path.with_suffix(".png"))
    assert "no file like img_00001.jpg in it" in frames.only_finding("val", 1, "error", "missing")


@pytest.mark.parametrize(("numbers", "base", "missing"), [(range(0, FRAMES), 1, FRAMES), (range(1, FRAMES + 1), 0, 0)])
def test_frames_numbered_from_another_number(frames, numbers, base, missing):
    """One folder is numbered differently; the others are numbered as the configuration says."""
    for folder in frames.media.iterdir():
        for number in range(1, FRAMES + 1) if base == 0 else ():
            (folder / f"img_{number:05d}.jpg").rename(folder / f"img_{number - 1:05d}.jpg")
    shutil.rmtree(frames.media / "train 4")
    write_frames(frames.media / "train 4", 4, numbers)
    message = frames.only_finding("train", 5, "error", "index_base", f"data.index_base={base}")
    assert f"numbered from {1 - base}, not from {base}: img_{missing:05d}.jpg is missing" in message


def test_the_list_counts_more_frames_than_there_are(frames):
    frames.lines["train"][2] = f"train 2 {FRAMES + 2} 2"
    message = frames.only_finding("train", 3, "error", "count")
    assert message.endswith("train 2: img_00005.jpg and 1 more missing; 6 frames listed, 4 files")
    assert frames.check("data.count_frames=True")[:2] == (0, [])


def test_the_list_counts_fewer_frames_than_there_are(frames):
    frames.lines["train"][2] = f"train 2 {FRAMES - 1} 2"
    assert "3 frames listed, 4 files: the others are never read" in frames.only_finding("train", 3, "warning", "count")


@pytest.mark.parametrize("overrides", [(), ("data.count_frames=True",)])
def test_a_gap_in_the_numbers(frames, overrides):
    (frames.media / "val 3" / "img_00002.jpg").unlink()
    message = frames.only_finding("val", 4, "error", "gap", *overrides)
    assert "img_00002.jpg missing" in message and "3 files" in message


def test_an_empty_file(frames):
    (frames.media / "train 7" / "img_00003.jpg").write_bytes(b"")
    assert frames.only_finding("train", 8, "error", "empty").endswith("img_00003.jpg empty; extract it again")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_a_truncated_image(frames, share):
    for number in (1, 4):
        path = frames.media / "train 7" / f"img_{number:05d}.jpg"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
    message = frames.only_finding("train", 8, "error", "unreadable")
    assert "img_00001.jpg and 1 more unreadable (" in message


def test_damage_inside_an_image_that_pillow_decodes_is_a_warning(frames):
    path = frames.media / "train 7" / "img_00003.jpg"
    content = bytearray(path.read_bytes())
    content[-40:-2] = b"\x55" * 20 + b"\xff\xd0" + b"\x55" * 16  # a restart marker where none belongs
    path.write_bytes(content)
    with Image.open(path) as image:
        image.load()
    assert "img_00003.jpg damaged, but decoded (" in frames.only_finding("train", 8, "warning", "damaged")


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_data_set_that_mixes_kinds_of_images_is_a_warning(frames, mode):
    for number in range(1, FRAMES + 1):
        path = frames.media / "train 7" / f"img_{number:05d}.jpg"
        with Image.open(path) as image:
            image.convert(mode).save(path)
    _, (finding,), _ = frames.check()
    assert (finding["severity"], finding["kind"]) == ("warning", "mixed")
    kinds = f"JPEG RGB (11 videos, the first val 0), JPEG {mode} (1 videos, the first train 7)"
    assert finding["message"] == f"frames of several kinds: {kinds}"


def test_damage_is_an_error_where_the_configuration_refuses_it(frames, videos):
    path = videos.media / "train 0.mp4"
    write_video(path, count=60, size=VIDEO_SIZE)
    path.write_bytes(path.read_bytes()[:-1])
    for on_damage, severity in (("accept", "warning"), ("error", "error")):
        message = videos.only_finding("train", 1, severity, "damaged", f"data.on_damage={on_damage}")
        assert "damaged (the file ends 1 bytes before the end that its header states); 60 frames" in message


def test_frames_that_nothing_refers_to_need_not_be_readable(frames):
    (frames.media / "train 7" / "img_00005.jpg").write_bytes(b"junk")
    frames.only_finding("train", 8, "warning", "count")


def test_frames_of_several_sizes(frames):
    Image.new("RGB", (30, 16)).save(frames.media / "val 2" / "img_00004.jpg")
    assert frames.only_finding("val", 3, "warning", "sizes").endswith("24x16 (3), 30x16 (1)")


def test_a_pipe_among_the_frames_is_an_error_and_is_not_opened(frames):
    path = frames.media / "train 7" / "img_00003.jpg"
    path.unlink()
    os.mkfifo(path)
    assert "img_00003.jpg unreadable (a pipe, a socket" in frames.only_finding("train", 8, "error", "unreadable")


def test_frames_of_another_padding_are_not_counted(frames):
    for number in range(1, FRAMES + 1):
        (frames.media / "val 2" / f"img_{number:04d}.jpg").write_bytes(b"junk")
    assert frames.check("data.count_frames=True")[:2] == (0, [])


def test_a_video_file_in_a_list_of_frames_names_the_key(frames):
    write_video(frames.media / "a.mp4", size=VIDEO_SIZE)
    frames.lines["train"][7] = f"a.mp4 {FRAMES} 3"
    message = frames.only_finding("train", 8, "error", "missing")
    assert message.endswith("a.mp4: Not a directory; data.modality: video reads video files")
    frames.lines["train"][7] = "a.mp4 3"
    assert frames.only_finding("train", 8, "error", "line").endswith("needs data.modality: video")


def test_a_nul_character_is_an_error_of_its_line(frames):
    frames.lines["train"][7] = f"train\0 7 {FRAMES} 3"
    assert "holds a NUL character" in frames.only_finding("train", 8, "error", "line")
    task = Task("train", str(frames.media), VideoRecord("a\0b", 8, 0, "list:1"))
    (finding,) = check_frame_folder(task, "img_{:05d}.jpg", 1, False).findings
    assert finding.severity == "error" and "null" in finding.message


# Video files


def test_a_video_that_is_missing_or_empty(videos):
    (videos.media / "train 6.mp4").unlink()
    (videos.media / "val 1.mp4").write_bytes(b"")
    _, findings, _ = videos.check()
    assert [(f["kind"], Path(f["place"]).name) for f in findings] == [
        ("missing", "train.txt:7"),
        ("empty", "val.txt:2"),
    ]


def test_a_column_too_many_is_explained(videos):
    videos.lines["train"][3] = f"train 3.mp4 {FRAMES} 3"
    message = videos.only_finding("train", 4, "error", "missing")
    assert message.endswith("train 3.mp4 is: a line must read 'path label', with no number between")


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
def test_videos_that_cannot_be_decoded_to_their_end(videos, decoder):
    whole = (videos.media / "train 2.mp4").read_bytes()
    (videos.media / "train 2.mp4").write_bytes(b"junk" * 100)
    (videos.media / "train 6.mp4").write_bytes(whole[: len(whole) // 2])
    _, findings, _ = videos.check(f"data.decoder={decoder}")
    assert [(f["kind"], Path(f["place"]).name) for f in findings] == [
        ("unreadable", "train.txt:3"),
        ("unreadable", "train.txt:7"),
    ]


def test_damage_in_the_middle_is_a_warning(videos):
    path = videos.media / "train 0.mp4"
    write_video(path, count=60, size=VIDEO_SIZE)
    content = bytearray(path.read_bytes())
    middle = (content.index(b"mdat") + content.index(b"moov")) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    message = videos.only_finding("train", 1, "warning", "damaged", "data.decoder=pyav")
    assert " cannot be decoded" in message and message.endswith("frames can be decoded")


def test_a_video_that_only_another_decoder_reads(videos):
    """PyAV reads a transport stream. Our decord reader refuses it, because decord may lose frames."""
    write_video(videos.media / "train 0.ts", size=VIDEO_SIZE)
    videos.lines["train"][0] = "train 0.ts 0"
    assert "decord" in videos.only_finding("train", 1, "error", "unreadable", "data.decoder=decord")
    assert videos.check("data.decoder=pyav")[:2] == (0, [])


def test_a_video_whose_end_only_the_reader_misses(videos):
    """The last packets hold no picture. PyAV ignores them; decord counts them and then finds fewer frames."""
    write_packets(videos.media / "train 0.mp4", 20, "mpeg4", empty=200)
    _, findings, _ = videos.check("data.decoder=decord")
    assert {Path(finding["place"]).name for finding in findings} == {"train.txt:1"}
    messages = [finding["message"] for finding in findings]
    assert "decord counts 220 frames, but 2" in messages[0] and "decord cannot read it" in messages[1]


def test_frames_that_the_decoder_calls_damaged_are_a_warning(videos):
    path = videos.media / "train 0.ts"
    write_video(path, count=20, size=(192, 128))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    videos.lines["train"][0] = "train 0.ts 0"
    _, findings, _ = videos.check("data.decoder=pyav")
    messages = [finding["message"] for finding in findings if finding["severity"] == "warning"]
    assert len(messages) == 1 and "damaged (1 frame decoded in part); 10 frames can be decoded" in messages[0]


@pytest.mark.parametrize("suffix", [".webm", ".mkv"])
def test_what_is_cut_off_without_an_error_is_a_warning(videos, suffix):
    path = videos.media / f"train 0{suffix}"
    write_video(path, count=40, size=VIDEO_SIZE)
    videos.lines["train"][0] = f"{path.name} 0"
    assert videos.check("data.decoder=pyav")[:2] == (0, [])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    message = videos.only_finding("train", 1, "warning", "damaged", "data.decoder=pyav")
    assert "bytes before the end that its header states" in message
    segment = content.index(b"\x18\x53\x80\x67") + 4
    unknown = b"\x01" + b"\xff" * 7  # the length of a recording that is still written
    path.write_bytes(content[:segment] + unknown + content[segment + 8 : len(content) // 2])
    message = videos.only_finding("train", 1, "warning", "cut_off", "data.decoder=pyav")
    assert "of the 1.6" in message
    for tag in (b"now", b"1:2", b"-1:00:00.0"):  # some programs write other texts
        at = content.index(b"00:00:01.6")
        path.write_bytes(content[:at] + tag.ljust(18, b"\0") + content[at + 18 :])
        assert videos.check("data.decoder=pyav")[:2] == (0, [])


def test_a_copy_of_a_video_is_a_warning(videos):
    shutil.copy(videos.media / "train 3.mp4", videos.media / "copy.mp4")
    videos.lines["train"].append("copy.mp4 3")
    assert f"train 3.mp4, at {videos.lists['train']}:4" in videos.only_finding("train", 9, "warning", "content")


# Reports


def test_a_cleaned_list_keeps_the_other_lines_to_the_byte_and_is_accepted(frames, tmp_path):
    config = frames.write()
    text = (
        f"\ufefftrain 0 {FRAMES} 0\r\n\r\nalone\ntrain 1\t{FRAMES}\t1  \ntrain 0 {FRAMES} 0\n"
        f"gone {FRAMES} 1\nval 3 {FRAMES} 2\ntrain 6 {FRAMES - 1} 2\ntrain 7 {FRAMES} 3"
    )
    frames.lists["train"].write_bytes(text.encode())
    with pytest.raises(DataError, match="its data have 4 errors"):
        main([config, "--clean", str(tmp_path / "clean"), "--workers", "0"])
    kept = text.encode().splitlines(keepends=True)
    kept = b"".join(kept[number] for number in (0, 1, 3, 7, 8))
    assert (tmp_path / "clean" / "train.txt").read_bytes() == kept
    assert (tmp_path / "clean" / "val.txt").read_bytes() == frames.lists["val"].read_bytes()
    assert frames.lists["train"].read_bytes() == text.encode()
    records = read_annotations(str(tmp_path / "clean" / "train.txt"), 4)
    assert [record.path for record in records] == ["train 0", "train 1", "train 6", "train 7"]
    overrides = [f"data.{part}_list={tmp_path}/clean/{part}.txt" for part in ("train", "val")]
    main([config, *overrides, "--workers", "0"])
    assert "0 errors, 1 warnings" in frames.capsys.readouterr().out


def test_a_list_of_errors_only_gives_no_cleaned_list(frames, tmp_path):
    frames.lines["val"] = ["bad", "bad"]
    frames.check("--clean", tmp_path / "clean")
    assert [path.name for path in (tmp_path / "clean").iterdir()] == ["train.txt"]


def test_the_lists_themselves_are_never_overwritten(frames):
    config = frames.write()
    with pytest.raises(UserError, match="--clean: .*train.txt is the list itself; name another folder"):
        main([config, "--clean", str(frames.root), "--workers", "0"])
    with pytest.raises(UserError, match="--clean: both lists are called train.txt"):
        main([config, "--clean", str(frames.root / "clean"), f"data.val_list={frames.lists['train']}"])


def test_many_findings_of_a_kind_are_counted_and_all_are_in_the_json_file(frames):
    frames.lines["train"] += ["bad"] * (PRINTED + 5)
    _, findings, output = frames.check()
    assert len(findings) == PRINTED + 5 and output.count(": error: ") == PRINTED
    assert f"{frames.lists['train']}: 5 more errors of the kind 'line'; --json FILE names all" in output


def test_a_test_configuration_needs_no_training_list(frames):
    for key in ("train_list", "train_root"):
        del frames.data[key]
    for overrides in (["solver.evaluate=True"], []):
        status, findings, output = frames.check(*overrides)
        assert (status, findings) == (0, []) and "train.txt" not in output
        assert "config.yaml: no data.train_list: checked for test.py only\n" in output
    frames.data["train_root"] = str(frames.media)
    with pytest.raises(UserError, match="data.train_list: missing, and this run needs it"):
        main([frames.write()])


def test_a_report_that_cannot_be_written_is_one_line(frames, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/report.json: cannot be written: ") as caught:
        main([frames.write(), "--workers", "0", "--json", str(tmp_path / "file" / "report.json")])
    assert "\n" not in str(caught.value)


# The real command line


def run(config, *arguments):
    command = [sys.executable, "tools/check_data.py", config, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_program_runs_from_the_repository_root(frames):
    config = frames.write()
    process = run(config)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "") and output.endswith("0 errors, 0 warnings\n")
    (frames.media / "train 2" / "img_00001.jpg").write_bytes(b"")
    process = run(config)
    output, errors = process.communicate()
    assert (process.returncode, errors) == (1, f"error: {config}: its data have 1 errors\n")
    assert output.startswith(f"{frames.lists['train']}:3: error: {frames.media}/train 2: img_00001.jpg empty")
    process = run(config, "data.num_clases=3")
    assert "did you mean data.num_classes?" in process.communicate()[1] and process.returncode == 1


def bytes_read_by_children(pid: int) -> int:
    """The largest number of bytes that a child of the process has read."""
    read = [0]
    with contextlib.suppress(OSError):  # it ends
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            read.append(int(Path(f"/proc/{child}/io").read_text().split()[1]))
    return max(read)


def test_an_interruption_is_one_line_and_writes_nothing(frames, tmp_path):
    # 60 frames of 81 million pixels, all one file, keep a process at work for a long time.
    large = frames.media / "train 0" / "img_00001.jpg"
    Image.new("L", (9000, 9000)).save(large, format="png", compress_level=0)
    for number in range(2, 61):
        (frames.media / "train 0" / f"img_{number:05d}.jpg").unlink(missing_ok=True)
        os.link(large, frames.media / "train 0" / f"img_{number:05d}.jpg")
    frames.lines["train"][0] = "train 0 60 0"
    arguments = ["--workers", 2, "--json", tmp_path / "report.json", "--clean", tmp_path / "clean"]
    process = run(frames.write(), *arguments)
    deadline = time.monotonic() + 60
    while bytes_read_by_children(process.pid) < 4 * large.stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    shutil.rmtree(frames.media / "train 0")
    assert (process.returncode, output, errors) == (1, "", "error: interrupted; nothing was written\n")
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "clean").exists()


@pytest.fixture
def segments(tmp_path, capsys):
    """Two long videos, each with two segments for training and one for validation."""
    data = DataSet(tmp_path, capsys, "video")
    data.data |= {"segments": True, "num_classes": 2, "label_list": None, "flip": False}
    for name in ("a.mp4", "b.mp4"):
        write_video(data.media / name, ord(name[0]), 30, VIDEO_SIZE)
    data.lines = {
        "train": ["a.mp4 0 10 0", "a.mp4 5 10 1", "b.mp4 20 10 0"],
        "val": ["a.mp4 20 10 0", "b.mp4 0 10 1"],
    }
    return data


def test_segments_without_faults_have_no_findings(segments):
    assert segments.check()[:2] == (0, [])


def test_each_fault_of_a_segment_is_named_with_file_and_line(segments):
    segments.lines["train"] += [
        "a.mp4 25 6 0",
        "a.mp4 -1 5 0",
        "a.mp4 0 10 1",
        "b.mp4 0 10 1",
        "b.mp4 5 10 1",
        "c.mp4 0 1 0",
    ]
    status, findings, _ = segments.check()
    assert status == 1
    found = [(finding["place"].rpartition(":")[2], finding["kind"], finding["message"]) for finding in findings]
    assert [(line, kind) for line, kind, _ in found] == [
        *(("4", "overlap"), ("4", "segment"), ("5", "line"), ("6", "duplicate")),
        *(("7", "overlap"), ("8", "overlap"), ("9", "missing")),
    ]
    assert found[1][2].endswith("a.mp4: the segment is of frames 25 to 30, but the file has 30 frames, from 0")
    assert "is a validation video too" in found[4][2] and "shares frames with the validation video" in found[5][2]


def test_a_long_video_is_decoded_once_for_all_its_segments_and_its_damage_fails_each(segments, monkeypatch):
    (segments.media / "a.mp4").write_bytes((segments.media / "a.mp4").read_bytes()[:1500])
    decoded = []
    check = check_videos.check_video_file
    monkeypatch.setattr(
        check_videos, "check_video_file", lambda task, *keys: decoded.append(task.path) or check(task, *keys)
    )
    status, findings, _ = segments.check()
    assert status == 1 and len(decoded) == 2
    assert sorted(
        (Path(f["place"].rpartition(":")[0]).stem, f["place"].rpartition(":")[2])
        for f in findings
        if f["severity"] == "error"
    ) == [
        ("train", "1"),
        ("train", "2"),
        ("val", "1"),
    ]


def test_damage_of_a_long_video_is_a_warning_of_its_first_segment(segments):
    path = segments.media / "a.mp4"
    write_packets(path, 30, b_frames=0, keys=250)
    spoil_packets(path, [25])
    status, findings, _ = segments.check()
    (finding,) = findings
    assert status == 0 and (finding["severity"], finding["kind"]) == ("warning", "damaged")
    assert finding["place"].endswith("val.txt:1") and f"{path}: damaged (" in finding["message"]
    status, findings, _ = segments.check("data.on_damage=error")
    assert status == 1 and [f["place"].rpartition("/")[2] for f in findings] == [
        "train.txt:1",
        "train.txt:2",
        "val.txt:1",
    ]


def test_segments_of_frames_that_start_behind_the_last_frame_or_are_endless_are_named(tmp_path, capsys):
    data = DataSet(tmp_path, capsys, "RGB")
    data.data |= {"segments": True, "num_classes": 1, "label_list": None, "flip": False, "index_base": 7}
    for name in "ab":
        write_frames(data.media / name, ord(name), range(7, 17))
    data.lines = {"train": ["a 0 10 0", "a 10 1 0", f"a 3 {10**12} 0", f"a {10**30} 2 0"], "val": ["b 9 1 0"]}
    status, findings, _ = data.check()
    assert status == 1
    assert [(f["place"].rpartition(":")[2], f["kind"], f["severity"]) for f in findings] == [
        (line, "count", "error") for line in "234"
    ]
    assert "img_00017.jpg missing; 1 frames listed from frame 10 on, 10 files" in findings[0]["message"]


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_frames_may_not_pass_the_last_frame(tmp_path, capsys, packed):
    data = DataSet(tmp_path, capsys, "RGB")
    data.data |= {"segments": True, "num_classes": 2, "label_list": None, "flip": False}
    for name in "ab":
        write_frames(data.media / name, ord(name), range(1, 11))
    data.lines = {"train": ["a 0 5 0", "a 5 5 1", "a 6 5 0"], "val": ["b 0 5 0", "b 5 5 1"]}
    if packed:
        prepare_data.main(["pack", str(data.media), str(tmp_path / "packed"), "--workers", "0"])
        capsys.readouterr()
        data.data |= {f"{part}_root": str(tmp_path / "packed") for part in ("train", "val")}
    status, findings, _ = data.check()
    assert status == 1
    (finding,) = findings
    assert (
        finding["place"].endswith(":3")
        and "img_00011.jpg missing; 5 frames listed from frame 6 on, 10 files" in finding["message"]
    )
