"""tools/prepare_data.py: videos to folders of frames, and official annotation files to lists."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import smooth_pictures, write_video

from datasets.annotations import VideoRecord, read_annotations, read_class_names
from datasets.readers import FrameFolderReader, VideoFileReader
from tools import extract_frames
from tools.find_videos import frame_folders
from tools.prepare_data import main
from utils.errors import DataError, UserError

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def videos(tmp_path):
    """Six videos in nested folders, one of them webm."""
    root = tmp_path / "videos"
    names = ("a/one.mp4", "a/two words.mp4", "b/c/three.mkv", "b/four.webm", "five.MP4", "six.mp4")
    for seed, name in enumerate(names):
        write_video(root / name, seed, 4 + seed)
    (root / "notes.txt").write_text("no video")
    (root / ".hidden.mp4").write_bytes(b"")
    return root


def extract(videos, out, *arguments):
    main(["extract", str(videos), str(out), "--workers", "0", *map(str, arguments)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_list(*arguments):
    main(["list", *map(str, arguments)])


# extract


def test_every_frame_is_written_in_order_under_the_path_of_its_video(videos, tmp_path, capsys):
    extract(videos, tmp_path / "out")
    lengths = {"a/one": 4, "a/two words": 5, "b/c/three": 6, "b/four": 7, "five": 8, "six": 9}
    expected = {f"{name}/img_{n:05d}.jpg" for name, length in lengths.items() for n in range(1, length + 1)}
    assert set(contents(tmp_path / "out")) == expected | {"extract.json"}
    assert "6 videos extracted, 0 were there already, 0 failed" in capsys.readouterr().out
    for seed, (name, length) in enumerate(lengths.items()):
        record = VideoRecord(name, length, 0, "list:1")
        read = FrameFolderReader(str(tmp_path / "out"), "img_{:05d}.jpg").open(record).read(list(range(length)))
        for frame, picture in zip(read, smooth_pictures(seed, length, (48, 32)), strict=True):
            assert np.abs(np.asarray(frame).astype(int) - picture).mean() < 8  # twice compressed


def test_frames_have_the_pixels_that_the_reader_gives(videos, tmp_path):
    """The pixels before JPEG compression, of frames that are not resized."""
    record = VideoRecord("a/one.mp4", None, 0, "list:1")
    read = VideoFileReader(str(videos), "pyav").open(record).read([0, 1, 2, 3])
    for frame, pixels in zip(read, extract_frames.upright_frames(videos / "a" / "one.mp4", 256), strict=True):
        assert np.array_equal(np.asarray(frame), pixels)


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [((48, 32), 16, (24, 16)), ((32, 48), 16, (16, 24)), ((50, 34), 16, (23, 16)), ((48, 32), 32, (48, 32))],
)
def test_only_a_longer_shorter_side_is_resized(tmp_path, size, short_side, expected):
    write_video(tmp_path / "videos" / "v.mp4", size=size)
    extract(tmp_path / "videos", tmp_path / "out", "--short_side", short_side)
    for number, picture in enumerate(smooth_pictures(0, 5, size), 1):
        with Image.open(tmp_path / "out" / "v" / f"img_{number:05d}.jpg") as image:
            assert image.size == expected
            wanted = np.asarray(Image.fromarray(picture).resize(expected, Image.Resampling.BICUBIC)).astype(int)
            assert np.abs(np.asarray(image) - wanted).mean() < 8


@pytest.mark.parametrize(("angle", "turns"), [(90, -1), (270, 1)])
def test_frames_are_upright(tmp_path, angle, turns):
    write_video(tmp_path / "videos" / "v.mp4", angle=angle)
    extract(tmp_path / "videos", tmp_path / "out", "--short_side", 16)
    with Image.open(tmp_path / "out" / "v" / "img_00001.jpg") as image:
        wanted = Image.fromarray(np.rot90(smooth_pictures(0, 1, (48, 32))[0], turns)).resize((16, 24))
        assert image.size == (16, 24)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(wanted)).mean() < 10


def test_quality_and_template_are_what_is_asked_for(videos, tmp_path):
    sizes = []
    for quality in (30, 90):
        out = tmp_path / str(quality)
        extract(videos, out, "--quality", quality, "--image_tmpl", "{:06d}.jpg")
        sizes.append((out / "six" / "000009.jpg").stat().st_size)
    assert sizes[0] < sizes[1]


def test_processes_write_what_one_writes(videos, tmp_path):
    extract(videos, tmp_path / "one")
    main(["extract", str(videos), str(tmp_path / "two"), "--workers", "2"])
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_list_names_the_videos(videos, tmp_path):
    (videos / "list.txt").write_text("a/two words.mp4 7\n\nsix.mp4 -1\nsix.mp4 0\n")
    extract(videos / "list.txt", tmp_path / "beside")
    (tmp_path / "elsewhere.txt").write_text("two words.mp4 7\n")
    extract(tmp_path / "elsewhere.txt", tmp_path / "root", "--root", videos / "a")
    assert {path.split("/img")[0] for path in contents(tmp_path / "beside")} == {"a/two words", "six", "extract.json"}
    assert {path.split("/img")[0] for path in contents(tmp_path / "root")} == {"two words", "extract.json"}


def test_a_second_run_writes_only_what_is_missing(videos, tmp_path, capsys):
    extract(videos, tmp_path / "out")
    first = contents(tmp_path / "out")
    stamp = {path: os.stat(tmp_path / "out" / path).st_mtime_ns for path in first}
    (tmp_path / "out" / "six").rename(tmp_path / "away")
    extract(videos, tmp_path / "out")
    assert "1 videos extracted, 5 were there already, 0 failed" in capsys.readouterr().out
    assert contents(tmp_path / "out") == first
    changed = {path for path in first if os.stat(tmp_path / "out" / path).st_mtime_ns != stamp[path]}
    assert {path.split("/")[0] for path in changed} == {"six"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [(["--short_side", 20], "short_side 256, now 20"), (["--quality", 80], "quality 90, now 80")],
)
def test_another_setting_is_refused_in_a_folder_that_is_there(videos, tmp_path, arguments, complaint):
    extract(videos, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=f"out/extract.json: .*made with {complaint}; name another folder"):
        extract(videos, tmp_path / "out", *arguments)
    assert contents(tmp_path / "out") == before


def test_other_videos_and_other_folders_are_refused(videos, tmp_path):
    extract(videos, tmp_path / "out")
    with pytest.raises(DataError, match=r"made with videos '.*/videos', now '.*/videos/a'"):
        extract(videos / "a", tmp_path / "out")
    with pytest.raises(DataError, match="videos: exists and was not made by this program"):
        extract(videos / "a", videos)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a.mp4", "a.webm"], "out/a: both .*a.mp4 and .*a.webm would be extracted there"),
        (["a.mp4", "a/b.mp4"], "out/a/b: .*a/b.mp4 would be extracted into the frames of .*/a.mp4"),
    ],
)
def test_videos_that_share_a_folder_are_refused_before_anything_is_written(tmp_path, names, complaint):
    for name in names:
        write_video(tmp_path / "videos" / name, count=1)
    with pytest.raises(DataError, match=complaint):
        extract(tmp_path / "videos", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_videos_are_reported_and_tried_again(videos, tmp_path, capsys):
    whole = (videos / "six.mp4").read_bytes()
    (videos / "six.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "list.txt").write_text("six.mp4 0\na/one.mp4 0\ngone.mp4 0\n")
    with pytest.raises(DataError, match="out/failures.json: 2 of 3 videos could not be extracted"):
        extract(videos / "list.txt", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "failures.json").read_text())
    reasons = {os.path.basename(failed["video"]): failed["reason"] for failed in report["failed"]}
    assert list(reasons) == ["six.mp4", "gone.mp4"] and report["videos"] == 3
    assert "Invalid data" in reasons["six.mp4"] and "No such file" in reasons["gone.mp4"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "extract.json", "failures.json"}
    (videos / "six.mp4").write_bytes(whole)
    (videos / "list.txt").write_text("six.mp4 0\na/one.mp4 0\n")
    extract(videos / "list.txt", tmp_path / "out")
    assert "1 videos extracted, 1 were there already, 0 failed" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "six", "extract.json"}


def test_a_damaged_video_gives_what_can_be_decoded_and_is_named(tmp_path, capsys):
    path = tmp_path / "videos" / "v.mp4"
    write_video(path, count=60)
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat")
    middle = start + 4 + (content.index(b"moov") - start) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(content)
    for there in (0, 1):
        extract(tmp_path / "videos", tmp_path / "out")
        assert f"{1 - there} videos extracted, {there} were there already, 0 failed" in capsys.readouterr().out
        report = json.loads((tmp_path / "out" / "failures.json").read_text())
        number = len(list((tmp_path / "out" / "v").iterdir()))
        assert 50 < number < 60
        (damaged,) = report["damaged"]
        assert report == {"videos": 1, "failed": [], "damaged": [damaged]} and damaged["video"] == str(path)
        assert " cannot be decoded" in damaged["reason"] and damaged["reason"].endswith(
            f"; {number} frames were extracted"
        )


def test_an_interrupted_run_leaves_whole_folders_only_and_the_next_one_goes_on(videos, tmp_path, monkeypatch):
    extract(videos, tmp_path / "unbroken")
    frames = extract_frames.upright_frames

    def interrupted_frames(path, short_side, damage):
        for number, pixels in enumerate(frames(path, short_side, damage)):
            if path.name == "four.webm" and number == 3:
                raise KeyboardInterrupt
            yield pixels

    monkeypatch.setattr(extract_frames, "upright_frames", interrupted_frames)
    with pytest.raises(UserError, match="interrupted; what is complete stays"):
        extract(videos, tmp_path / "out")
    done, unbroken = contents(tmp_path / "out"), contents(tmp_path / "unbroken")
    assert {path.rpartition("/")[0] for path in done} == {"", "a/one", "a/two words", "b/c/three"}
    assert done.items() <= unbroken.items()
    monkeypatch.undo()
    extract(videos, tmp_path / "out")
    assert contents(tmp_path / "out") == unbroken


def test_what_a_killed_process_leaves_does_not_look_finished(videos, tmp_path, capsys):
    out = tmp_path / "out"
    extract(videos, out)
    whole = contents(out)
    half = extract_frames.unfinished(out / "six")
    (out / "six").rename(half)
    (half / "img_00009.jpg").write_bytes(b"")
    listed = {found.path for found in frame_folders(out, "img_{:05d}.jpg")}
    assert listed == {"a/one", "a/two words", "b/c/three", "b/four", "five"}
    extract(videos, out)
    assert contents(out) == whole


def test_a_video_that_is_done_is_left_alone(videos, tmp_path):
    """A process may end after its last step but before it returns, and then the video is extracted again."""
    job = extract_frames.Job(videos / "a" / "one.mp4", tmp_path / "one")
    settings = extract_frames.Extraction(str(videos), 256, 90, "img_{:05d}.jpg")
    assert extract_frames.extract_video(job, settings) is None
    first = {path: path.stat().st_mtime_ns for path in job.folder.iterdir()}
    assert extract_frames.extract_video(job, settings) is None
    assert {path: path.stat().st_mtime_ns for path in job.folder.iterdir()} == first


def test_a_full_disk_is_one_line_and_leaves_nothing_half(videos, tmp_path, monkeypatch):
    save, saved = Image.Image.save, []

    def full(self, path, **options):
        if len(saved) == 6:
            raise OSError(28, "No space left on device")
        saved.append(path)
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match="out/a/two words: cannot be written: No space left on device") as caught:
        extract(videos, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert {path.split("/img")[0] for path in contents(tmp_path / "out")} == {"extract.json", "a/one"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--quality", "0"], "--quality: must be 1 to 95, got 0"),
        (["--short_side", "0"], "--short_side: must be 1 or more, got 0"),
        (["--workers", "-1"], "--workers: must be 0 or more, got -1"),
        (["--image_tmpl", "frame.jpg"], "--image_tmpl: must be a file name with a field"),
        (["--image_tmpl", "frames/{:05d}.jpg"], "--image_tmpl: must be a file name with a field"),
        (["--image_tmpl", "{:05d}.png"], "--image_tmpl: must be the name of a JPEG file"),
        (["--root", "."], "videos: is a folder, whose videos are all taken"),
    ],
)
def test_wrong_arguments_are_one_line(videos, tmp_path, arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        main(["extract", str(videos), str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("../v.mp4 0\n", r"list.txt:1: ../v.mp4: must lie below the root"),
        ("a.mp4 0\n/v.mp4 0\n", r"list.txt:2: /v.mp4: must lie below the root"),
        ("a.mp4\n", r"list.txt:1: a line must read 'path label'"),
        ("\n", "list.txt: the list is empty"),
    ],
)
def test_a_list_that_leads_elsewhere_is_refused(tmp_path, text, complaint):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=complaint):
        extract(tmp_path / "list.txt", tmp_path / "out")


def test_nothing_to_extract_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no videos in it"):
        extract(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(DataError, match="gone: cannot be read"):
        extract(tmp_path / "gone", tmp_path / "out")


# The real command line


def command(*arguments):
    return [sys.executable, "tools/prepare_data.py", *map(str, arguments)]


def test_the_programs_run_from_the_repository_root_without_torch(videos, tmp_path):
    out, lists = tmp_path / "out", tmp_path / "lists"
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        command("extract", videos / "a", out, "--workers", 2), cwd=REPOSITORY, capture_output=True, text=True,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == f"{out}: 2 videos extracted, 0 were there already, 0 failed\n"
    assert "| av" in done.stderr and "| torch" not in done.stderr
    (videos / "a" / "bad.mp4").write_bytes(b"bad")
    done = subprocess.run(command("extract", videos / "a", out), cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"error: {out}/failures.json: 1 of 3 videos could not be extracted; it says why\n"
    arguments = ["list", "folders", videos, lists, "--modality", "video"]
    done = subprocess.run(
        [sys.executable, "-m", "tools.prepare_data", *map(str, arguments)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith(f"error: {videos}/five.MP4: is in no class folder")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path, number):
    """Also while a process is busy: one waits forever for a pipe without a writer."""
    root, out = tmp_path / "videos", tmp_path / "out"
    for seed in (0, 1, 3, 4):
        write_video(root / f"v{seed}.mp4", seed)
    os.mkfifo(root / "v2.mp4")
    (root / "list.txt").write_text("".join(f"v{seed}.mp4 0\n" for seed in range(5)))  # a search would leave it out
    process = subprocess.Popen(
        command("extract", root / "list.txt", out, "--workers", 2),
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob("v*"))) < 4 or not (out / ".v2.unfinished").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=60)  # returns when its last process has closed the pipes
    assert process.returncode == (1 if number == signal.SIGINT else -number)
    if number == signal.SIGINT:
        assert errors == "error: interrupted; what is complete stays, and the same command goes on\n"
        assert not list(out.glob(".*"))
    (root / "v2.mp4").unlink()
    write_video(root / "v2.mp4", 2)
    extract(root, out)
    extract(root, tmp_path / "unbroken")
    assert contents(out) == contents(tmp_path / "unbroken")


# list


@pytest.fixture
def touch(tmp_path):
    """touch(root, **videos): a file of one byte for each path: None, a folder of empty frames for path: number."""

    def make(root, **videos):
        for path, count in videos.items():
            place = tmp_path / root / path
            if count is None:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(b"x")
                continue
            numbers = range(1, count + 1) if isinstance(count, int) else count
            place.mkdir(parents=True)
            for number in numbers:
                (place / f"img_{number:05d}.jpg").touch()
        return tmp_path / root

    return make


def read_lists(out, modality="RGB"):
    """{part: [(path, num_frames, class name)]} as training reads the lists."""
    names = [line.split(",", 1)[1] for line in (out / "classes.csv").read_text().splitlines()[1:]]
    names = read_class_names(str(out / "classes.csv"), len(names))
    suffix = "_videos" if modality == "video" else ""
    return {
        part: [
            (record.path, record.num_frames, names[record.label])
            for record in read_annotations(str(out / f"{part}{suffix}.txt"), len(names), modality)
        ]
        for part in ("train", "val")
        if (out / f"{part}{suffix}.txt").exists()
    }, names


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_kinetics(touch, tmp_path, capsys):
    train_root = touch(
        "train", **{"riding_a_bike/-a_b-C_000003_000013.mp4": None, "abseiling/xyz_000120_000130.mkv": None}
    )
    val_root = touch("val", **{"q r_000000_000010.mp4": None})
    train = write(
        tmp_path / "train.csv",
        'label,youtube_id,time_start,time_end,split,is_cc\n"riding, a bike",-a_b-C,3,13,train,0\n'
        "abseiling,xyz,120,130,train,1\n",
    )
    val = write(tmp_path / "val.csv", 'label,youtube_id,time_start,time_end,split\n"riding, a bike",q r,0.0,10,val\n')
    out = tmp_path / "out"
    options = ["--train", train, "--val", val, "--val_root", val_root, "--modality", "video"]
    make_list("kinetics", train_root, out, *options)
    lists, names = read_lists(out, "video")
    assert names == ["abseiling", "riding, a bike"]
    assert lists == {
        "train": [
            ("riding_a_bike/-a_b-C_000003_000013.mp4", None, "riding, a bike"),
            ("abseiling/xyz_000120_000130.mkv", None, "abseiling"),
        ],
        "val": [("q r_000000_000010.mp4", None, "riding, a bike")],
    }
    assert (out / "classes.csv").read_text() == 'id,name\n0,abseiling\n1,"riding, a bike"\n'
    output = capsys.readouterr().out
    assert f"train_list: {out}/train_videos.txt" in output and f"val_root: {val_root}" in output
    assert "num_classes: 2" in output and "index_base" not in output


def test_something_v1_frames_in_alphabetical_class_order(touch, tmp_path, capsys):
    root = touch("frames", **{"100": 3, "7": 12, "55": 1})
    labels = write(tmp_path / "labels.csv", "Turning something\nHolding something\nPulling something left\n")
    train = write(tmp_path / "train.csv", "7;Holding something\n100;Turning something\n")
    val = write(tmp_path / "val.csv", "55;Pulling something left\n")
    make_list("something-v1", root, tmp_path / "out", "--train", train, "--val", val, "--labels", labels)
    lists, names = read_lists(tmp_path / "out")
    assert names == sorted(names) and len(names) == 3
    assert lists["train"] == [("7", 12, "Holding something"), ("100", 3, "Turning something")]
    assert lists["val"] == [("55", 1, "Pulling something left")]
    assert (tmp_path / "out" / "train.txt").read_text() == "7 12 0\n100 3 2\n"
    assert "numbered in alphabetical order" in capsys.readouterr().out


def test_something_v2_templates_lose_their_brackets(touch, tmp_path, capsys):
    root = touch("videos", **{"78687.webm": None, "42326.webm": None})
    labels = {"Approaching something with your camera": "0", "Holding something next to something": "1"}
    entries = [
        {
            "id": "78687",
            "label": "holding potato next to vicks vaporub bottle",
            "template": "Holding [something] next to [something]",
            "placeholders": ["potato", "vicks vaporub bottle"],
        }
    ]
    val = [{"id": "42326", "label": "...", "template": "Approaching [something] with your camera", "placeholders": []}]
    files = [write(tmp_path / f"{i}.json", json.dumps(c)) for i, c in enumerate((labels, entries, val))]
    options = ["--labels", files[0], "--train", files[1], "--val", files[2], "--modality", "video"]
    make_list("something-v2", root, tmp_path / "out", *options)
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == list(labels)
    assert lists["train"] == [("78687.webm", None, "Holding something next to something")]
    assert lists["val"] == [("42326.webm", None, "Approaching something with your camera")]
    assert "numbered in alphabetical order" not in capsys.readouterr().out


def test_ucf101(touch, tmp_path):
    root = touch("UCF-101", **{f"{name}/v_{name}_g0{i}_c01.avi": None for i in (1, 2) for name in ("Archery", "YoYo")})
    labels = write(tmp_path / "classInd.txt", "1 YoYo\n2 Archery\n")
    train = write(tmp_path / "trainlist01.txt", "Archery/v_Archery_g01_c01.avi 2\r\nYoYo/v_YoYo_g01_c01.avi 1\r\n")
    val = write(tmp_path / "testlist01.txt", "Archery/v_Archery_g02_c01.avi\nYoYo/v_YoYo_g02_c01.avi\n")
    options = ["--labels", labels, "--train", train, "--val", val, "--modality", "video"]
    make_list("ucf101", root, tmp_path / "out", *options)
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["YoYo", "Archery"]  # the official numbers minus one
    assert lists["train"] == [
        ("Archery/v_Archery_g01_c01.avi", None, "Archery"),
        ("YoYo/v_YoYo_g01_c01.avi", None, "YoYo"),
    ]
    assert [path for path, *_ in lists["val"]] == ["Archery/v_Archery_g02_c01.avi", "YoYo/v_YoYo_g02_c01.avi"]


def test_hmdb51(touch, tmp_path):
    root = touch("frames", **{"brush_hair/a (1)!": 2, "brush_hair/b": 3, "cartwheel/c c": 4, "cartwheel/d": 5})
    (tmp_path / "splits").mkdir()
    for name, videos in {"brush_hair": ("a (1)!", "b"), "cartwheel": ("c c", "d")}.items():
        for split, marks in {1: "12", 2: "01", 3: "21"}.items():
            lines = [f"{video}.avi {mark} \n" for video, mark in zip(videos, marks, strict=True)]
            write(tmp_path / "splits" / f"{name}_test_split{split}.txt", "".join(lines))
    first, second = ("brush_hair/a (1)!", 2, "brush_hair"), ("brush_hair/b", 3, "brush_hair")
    third, fourth = ("cartwheel/c c", 4, "cartwheel"), ("cartwheel/d", 5, "cartwheel")
    for split, train, val in ((1, [first, third], [second, fourth]), (3, [second, fourth], [first, third])):
        out = tmp_path / str(split)
        make_list("hmdb51", root, out, "--splits", tmp_path / "splits", "--split", split)
        assert read_lists(out) == ({"train": train, "val": val}, ["brush_hair", "cartwheel"])
    with pytest.raises(DataError, match="frames: none of the videos for val is there, so no list is written"):
        make_list("hmdb51", root, tmp_path / "2", "--splits", tmp_path / "splits", "--split", 2)
    assert not (tmp_path / "2").exists()


def test_a_folder_for_each_class(touch, tmp_path):
    root = touch("train", **{"jump/b.mp4": None, "jump/more/a.mp4": None, "go left/x 1.mp4": None})
    val_root = touch("val", **{"jump/z.mp4": None})
    make_list("folders", root, tmp_path / "out", "--val_root", val_root, "--modality", "video")
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["go left", "jump"]
    assert [path for path, *_ in lists["train"]] == ["go left/x 1.mp4", "jump/b.mp4", "jump/more/a.mp4"]
    assert lists["val"] == [("jump/z.mp4", None, "jump")]


def test_a_share_of_each_class_is_held_out_the_same_every_time(touch, tmp_path):
    sizes = {"a": 20, "b": 10, "c": 2, "d": 1}
    root = touch("videos", **{f"{name}/{i}.mp4": None for name, size in sizes.items() for i in range(size)})
    chosen = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        make_list("folders", root, out, "--modality", "video", "--val_share", "0.2", "--seed", seed)
        lists, _ = read_lists(out, "video")
        train, val = ({path for path, *_ in lists[part]} for part in ("train", "val"))
        assert not train & val and len(train | val) == 33
        counts = [sum(path.startswith(f"{name}/") for path in val) for name in "abcd"]
        assert counts == [4, 2, 1, 0]
        chosen.append(val)
    assert chosen[0] == chosen[1] != chosen[2]


def test_lists_of_one_folder_share_their_classes(touch, tmp_path):
    """If the lists were written one after the other, the second, which lacks a class, would number them differently."""
    root = touch(
        "videos", **{"a/1_000000_000010.mp4": None, "b/2_000000_000010.mp4": None, "b/3_000000_000010.mp4": None}
    )
    header = "label,youtube_id,time_start,time_end\n"
    train = write(tmp_path / "train.csv", f"{header}a,1,0,10\nb,2,0,10\n")
    val = write(tmp_path / "val.csv", f"{header}b,3,0,10\n")
    options = ["kinetics", root, tmp_path / "out", "--modality", "video"]
    make_list(*options, "--train", train)
    with pytest.raises(DataError, match="out/classes.csv: is there and does not number these 1 classes alike"):
        make_list(*options, "--val", val)
    assert not (tmp_path / "out" / "val_videos.txt").exists()
    make_list(*options, "--train", train, "--val", val)
    assert read_lists(tmp_path / "out", "video")[0]["val"] == [("b/3_000000_000010.mp4", None, "b")]


def test_missing_videos_stop_the_lists_unless_they_may_be_left_out(touch, tmp_path, capsys):
    root = touch("videos", **{"7.webm": None})
    labels = write(tmp_path / "labels.csv", "Holding something\n")
    train = write(tmp_path / "train.csv", "7;Holding something\n8;Holding something\n\n9;Holding something\n")
    out = tmp_path / "out"
    options = ["something-v1", root, out, "--train", train, "--labels", labels, "--modality", "video"]
    with pytest.raises(DataError, match="out/missing.txt: names what is missing: 2 of 3 videos are not on disk"):
        make_list(*options)
    assert [path.name for path in out.iterdir()] == ["missing.txt"]
    assert (out / "missing.txt").read_text() == f"{train}:2: 8\n{train}:4: 9\n"
    make_list(*options, "--leave_out_missing")
    assert read_lists(out, "video")[0] == {"train": [("7.webm", None, "Holding something")]}
    assert "2 of 3 videos are not on disk and left out" in capsys.readouterr().out
    touch("videos", **{"8.webm": None, "9.webm": None})
    make_list(*options)
    assert not (out / "missing.txt").exists() and len(read_lists(out, "video")[0]["train"]) == 3


@pytest.mark.parametrize(
    ("videos", "complaint"),
    [
        ({"a/x": 3, "a/y": range(0, 3)}, "frames are numbered from 0 in a/y; from 1 in a/x; all must start"),
        ({"a/x": range(5, 9), "a/y": range(7, 9)}, "frames are numbered from 5 in a/x; from 7 in a/y; all must start"),
        ({"a": 3}, "frames/a: is in no class folder"),
        ({"a/x.mp4": None}, "frames: no folders of frames like img_00001.jpg in it; check --modality and"),
        ({"a /x": 2, " b/y": 2}, "' b/y': such a path cannot stand in a list"),
        ({"a/line\nbreak": 2}, "such a path cannot stand in a list"),
    ],
)
def test_folders_that_make_no_list(touch, tmp_path, videos, complaint):
    root = touch("frames", **videos)
    with pytest.raises(DataError, match=complaint):
        make_list("folders", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_template_without_a_number_makes_no_list(touch, tmp_path):
    root = touch("frames", **{"a/x": 3})
    with pytest.raises(UserError, match="--image_tmpl: must be a file name with a field for the number, got 'img.jpg'"):
        make_list("folders", root, tmp_path / "out", "--image_tmpl", "img.jpg")


def test_frames_from_0_and_gaps_are_stated(touch, tmp_path, capsys):
    root = touch("frames", **{"a/x": range(0, 4), "a/y": [0, 1, 3]})
    make_list("folders", root, tmp_path / "out")
    output = capsys.readouterr().out
    assert "index_base: 0" in output and "warning: 1 folders lack some of their frames, such as a/y" in output
    assert (tmp_path / "out" / "train.txt").read_text() == "a/x 4 0\na/y 3 0\n"


def test_a_name_that_is_there_twice_is_refused(touch, tmp_path):
    root = touch("videos", **{"one/7.webm": None, "two/7.mp4": None})
    labels = write(tmp_path / "labels.csv", "Holding something\n")
    train = write(tmp_path / "train.csv", "7;Holding something\n")
    with pytest.raises(DataError, match=r"train.csv:1: 7 is there 2 times below .*: one/7.webm and two/7.mp4"):
        make_list("something-v1", root, tmp_path / "out", "--train", train, "--labels", labels, "--modality", "video")


@pytest.mark.parametrize(
    ("source", "files", "complaint"),
    [
        (
            "kinetics",
            {"train": "label,youtube_id\nx,y\n"},
            r"train:1: the header must name .*, but time_start is missing",
        ),
        (
            "kinetics",
            {"train": "label,youtube_id,time_start,time_end\n\nx,y,a,b\n"},
            r"train:3: times in seconds and 4 columns expected",
        ),
        ("kinetics", {}, "no annotation file: give --train, --val or both"),
        ("something-v1", {"train": "7,Holding\n", "labels": "Holding\n"}, "train:1: a line must read 'id;class'"),
        ("something-v1", {"train": "7;Folding\n", "labels": "Holding\n"}, "train:1: 'Folding' is no class"),
        ("something-v2", {"train": "[{]", "labels": '{"a": "0"}'}, "train: is not valid JSON"),
        ("something-v2", {"train": "{}", "labels": '{"a": "0"}'}, "train: must hold a JSON list"),
        ("something-v2", {"train": '[{"id": "7"}]', "labels": '{"a": "0"}'}, "train: entry 1: must have an id and a"),
        ("something-v2", {"train": "[]", "labels": '{"a": "b"}'}, "labels: must hold {name: index, ...}"),
        ("ucf101", {"train": "A/v.avi 1\n", "labels": "2 A\n"}, "labels:1: a line must read '1 Class', got '2 A'"),
        ("ucf101", {"train": "B/v.avi 1\n", "labels": "1 A\n"}, "train:1: 'Class/video.avi' with a class of the label"),
        ("ucf101", {"train": "A/v.avi 2\n", "labels": "1 A\n"}, "train:1: A is number 1 in the label file"),
    ],
)
def test_files_of_another_format_are_named_with_their_line(touch, tmp_path, source, files, complaint):
    root = touch("videos", **{"7.webm": None})
    options = [part for name, text in files.items() for part in (f"--{name}", write(tmp_path / name, text))]
    with pytest.raises(UserError, match=complaint) as caught:
        make_list(source, root, tmp_path / "out", *options, "--modality", "video")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_hmdb51_without_its_files_and_with_a_wrong_line(touch, tmp_path):
    root = touch("videos", **{"a/7.avi": None})
    (tmp_path / "splits").mkdir()
    options = ["hmdb51", root, tmp_path / "out", "--splits", tmp_path / "splits"]
    with pytest.raises(DataError, match="splits: no file like brush_hair_test_split1.txt"):
        make_list(*options)
    write(tmp_path / "splits" / "a_test_split1.txt", "7.avi 1\n8.avi 3\n")
    with pytest.raises(DataError, match="a_test_split1.txt:2: a line must read 'video.avi' and 0, 1 or 2"):
        make_list(*options)


@pytest.mark.parametrize("share", ["0", "1", "1.5"])
def test_a_share_is_a_part(touch, tmp_path, share):
    root = touch("videos", **{"a/7.avi": None})
    with pytest.raises(UserError, match="--val_share: must be above 0 and below 1"):
        make_list("folders", root, tmp_path / "out", "--modality", "video", "--val_share", share)
    with pytest.raises(UserError, match="--val_share: not together with --val_root"):
        make_list("folders", root, tmp_path / "out", "--modality", "video", "--val_share", "0.5", "--val_root", root)


def test_a_validation_class_without_training_folder_is_refused(touch, tmp_path):
    root, val_root = touch("train", **{"a/7.avi": None}), touch("val", **{"a/8.avi": None, "b/9.avi": None})
    with pytest.raises(DataError, match="val/b: no such class folder in .*train"):
        make_list("folders", root, tmp_path / "out", "--modality", "video", "--val_root", val_root)


# What a search leaves out


def test_links_that_lead_back_are_not_entered_and_are_named(touch, tmp_path, capsys):
    root = touch("data/k", **{"run/1.mp4": None, "eat/1.mp4": None})
    (root / "k").symlink_to(root)
    (root / "run" / "up").symlink_to("..")
    (root / "eat" / "above").symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to(root)
    for number, start in enumerate((root, tmp_path / "alias")):
        make_list("folders", start, tmp_path / str(number), "--modality", "video")
        lists, names = read_lists(tmp_path / str(number), "video")
        assert names == ["eat", "run"] and [path for path, *_ in lists["train"]] == ["eat/1.mp4", "run/1.mp4"]
        output = capsys.readouterr().out
        assert f"{start}: left out: links to a folder that contains them (3): eat/above, k, run/up\n" in output


def test_two_folders_that_link_to_each_other_end(touch, tmp_path):
    root = touch("frames", **{"a/1": 2, "b/1": 3})
    (root / "a" / "to b").symlink_to(root / "b")
    (root / "b" / "to a").symlink_to(root / "a")
    assert sorted(found.path for found in frame_folders(root, "img_{:05d}.jpg")) == [
        "a/1", "a/to b/1", "b/1", "b/to a/1"
    ]  # fmt: skip
    with pytest.raises(
        DataError, match="b/1 is of class 'b' here, and of class 'a' at .*, as a/to b/1; a video has one"
    ):
        make_list("folders", root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_that_all_link_to_each_other_end(touch, tmp_path, capsys):
    """Nine folders have more than a million paths without a repetition."""
    names = "abcdefghi"
    store = touch("store", **{f"{name}/{name}.mp4": None for name in names})
    for name in names:
        for other in names:
            if other != name:
                (store / name / f"to {other}").symlink_to(store / other)
    root = touch("videos", **{"x/0.mp4": None})
    (root / "x" / "more").symlink_to(store / "a")
    make_list("folders", root, tmp_path / "out", "--modality", "video")
    paths = (tmp_path / "out" / "train_videos.txt").read_text().splitlines()
    assert sorted(os.path.basename(path) for path in paths) == ["0.mp4 0", *(f"{name}.mp4 0" for name in names)]
    output = capsys.readouterr().out
    assert f"{root}: left out: links to a folder that another link has led to (" in output


def test_links_to_other_places_are_followed(touch, tmp_path):
    store = touch("store", **{"1.mp4": None, "folder/2.mp4": None})
    root = touch("videos", **{"a/0.mp4": None})
    (root / "a" / "1.mp4").symlink_to(store / "1.mp4")
    (root / "b").symlink_to(store / "folder")
    make_list("folders", root, tmp_path / "out", "--modality", "video")
    assert [path for path, *_ in read_lists(tmp_path / "out", "video")[0]["train"]] == ["a/0.mp4", "a/1.mp4", "b/2.mp4"]


def test_what_is_no_file_and_what_has_another_suffix_is_counted_and_named(touch, tmp_path, capsys):
    root = touch("videos", **{"a/1.mp4": None, "a/2.MP4": None, "a/3.mxf": None, "a/4.mxf": None, "a/notes": None})
    touch("videos", **{"b/5.mp4": None, "c/6.gif": None})
    os.mkfifo(root / "a" / "pipe.mp4")
    (root / "a" / "broken.mp4").symlink_to("nowhere.mp4")
    (root / "a" / "itself.mp4").symlink_to("itself.mp4")
    (root / "d").mkdir()
    make_list("folders", root, tmp_path / "out", "--modality", "video")
    assert [path for path, *_ in read_lists(tmp_path / "out", "video")[0]["train"]] == ["a/1.mp4", "a/2.MP4", "b/5.mp4"]
    assert capsys.readouterr().out.splitlines()[:7] == [
        f"{root}: left out: broken links (2): a/broken.mp4, a/itself.mp4",
        f"{root}: left out: pipes, sockets or devices (1): a/pipe.mp4",
        f"{root}: left out: files without a suffix (1): a/notes",
        f"{root}: left out: .gif files with other names (1): c/6.gif",
        f"{root}: left out: .mxf files with other names (2): a/3.mxf, a/4.mxf",
        f"{root}: left out: folders that gave nothing (2): c, d",
        f"{root}: warning: class folders without videos (2): c, d",
    ]


def test_frames_are_those_that_the_template_names(touch, tmp_path, capsys):
    root = touch("frames", **{"a/1": 12, "b/1": 5, "c/1": 4})
    for number in range(1, 13):
        (root / "a" / "1" / f"img_{number:04d}.jpg").touch()
    os.mkfifo(root / "b" / "1" / "img_00006.jpg")
    for path in (root / "c" / "1").iterdir():
        path.rename(path.with_suffix(".JPG"))
    (root / "b" / "1" / "more").mkdir()
    make_list("folders", root, tmp_path / "out")
    assert (tmp_path / "out" / "train.txt").read_text() == "a/1 12 0\nb/1 5 1\n"
    output = capsys.readouterr().out
    assert ".jpg files with other names (12): a/1/img_0001.jpg, a/1/img_0002.jpg, a/1/img_0003.jpg, ..." in output
    assert ".JPG files with other names (4): c/1/img_00001.JPG, " in output
    assert "folders inside a folder of frames (1): b/1/more" in output
    assert "class folders without videos (1): c\n" in output
    with pytest.raises(DataError, match=r"no folders of frames like img_1.jpg in it; .*\.jpg files with other names"):
        make_list("folders", root, tmp_path / "none", "--image_tmpl", "img_{}.jpg")


def test_extract_names_what_it_leaves_out(videos, tmp_path, capsys):
    (videos / "b" / "up").symlink_to(videos)
    extract(videos, tmp_path / "out")
    output = capsys.readouterr().out
    assert f"{videos}: left out: links to a folder that contains them (1): b/up\n" in output
    assert ".txt files with other names (1): notes.txt" in output and "6 videos extracted" in output


# A list holds nothing that training or check_data refuses


def test_an_empty_file_counts_as_missing(touch, tmp_path):
    root = touch("videos", **{"a/1.mp4": None, "a/2.mp4": None})
    (root / "a" / "2.mp4").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 of 2 videos are not on disk or empty; --leave_out_missing lists the others"):
        make_list("folders", root, out, "--modality", "video")
    assert (out / "missing.txt").read_text() == f"{root}: a/2 (an empty file)\n"
    make_list("folders", root, out, "--modality", "video", "--leave_out_missing")
    assert (out / "train_videos.txt").read_text() == "a/1.mp4 0\n"


def test_files_that_differ_in_their_suffix_only_are_both_listed(touch, tmp_path):
    root = touch("videos", **{"a/001.mp4": None, "a/001.mov": None, "b/001.mp4": None})
    make_list("folders", root, tmp_path / "out", "--modality", "video")
    assert [path for path, *_ in read_lists(tmp_path / "out", "video")[0]["train"]] == [
        "a/001.mov", "a/001.mp4", "b/001.mp4"
    ]  # fmt: skip
    table = write(tmp_path / "t.csv", "file,label\na/001.mp4,x\na/001.mov,y\n")
    make_list("table", table, root, tmp_path / "t", "--path", "file", "--label", "label", "--modality", "video")
    assert (tmp_path / "t" / "train_videos.txt").read_text() == "a/001.mp4 0\na/001.mov 1\n"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (b"caf\xe9", r"such a (class name|path) cannot stand in"),
        (b"a\nb", r"such a (class name|path) cannot stand in"),
        (b"run ", "'run' and 'run ': the names of these classes differ only in spaces; rename one"),
        (b" ", "' ': a class needs a name of more than spaces"),
    ],
)
def test_class_folders_that_a_list_cannot_name_are_one_line(touch, tmp_path, name, complaint):
    root = touch("videos", **{"run/1.mp4": None})
    folder = os.path.join(os.fsencode(root), name)
    os.mkdir(folder)
    with open(os.path.join(folder, b"2.mp4"), "wb") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=complaint):
        make_list("folders", root, tmp_path / "out", "--modality", "video")
    assert not (tmp_path / "out").exists()


def test_a_path_that_begins_like_a_text_file_is_refused(touch, tmp_path):
    root = touch("videos", **{"\ufeffa/1.mp4": None})
    with pytest.raises(DataError, match="such a path cannot stand in a list"):
        make_list("folders", root, tmp_path / "out", "--modality", "video")


HEADER = "label,youtube_id,time_start,time_end\n"


def test_one_video_has_one_label_and_is_in_one_part(touch, tmp_path, capsys):
    root = touch("videos", **{f"{i}_000000_000010.mp4": None for i in range(3)})
    options = ["kinetics", root, tmp_path / "out", "--modality", "video", "--train"]
    with pytest.raises(
        DataError, match=r"t.csv:3: 0_.*mp4 is of class 'b' here, and of class 'a' at .*t.csv:2; a video"
    ):
        make_list(*options, write(tmp_path / "t.csv", f"{HEADER}a,0,0,10\nb,0,0,10\n"))
    train = write(tmp_path / "t.csv", f"{HEADER}a,0,0,10\nb,1,0,10\na,0,0,10\n")
    val = write(tmp_path / "v.csv", f"{HEADER}b,1,0,10\n")
    with pytest.raises(DataError, match=r"v.csv:2: 1_.*mp4: is a training video too, at .*t.csv:3; remove one"):
        make_list(*options, train, "--val", val)
    assert not (tmp_path / "out").exists()
    make_list(*options, train)
    assert (tmp_path / "out" / "train_videos.txt").read_text() == "0_000000_000010.mp4 0\n1_000000_000010.mp4 1\n"
    assert "1 videos are named more than once and listed once: 0_000000_000010.mp4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "val"),
        ("Training", "Validation", "test"),
        ("train",),
        ("val", "train", "x"),
        ("train_256", "val_256"),
        ("trainset", "evaluation"),
    ],
)
def test_splits_are_not_taken_for_classes(touch, tmp_path, folders):
    root = touch("data", **{f"{name}/run/{name}.mp4": None for name in folders})
    with pytest.raises(
        DataError, match="data: holds the splits .*, not one folder per class; give .* as ROOT"
    ) as caught:
        make_list("folders", root, tmp_path / "out", "--modality", "video")
    if len(folders) > 1:
        train, val = sorted(folders, key=lambda name: name.lower().find("train"), reverse=True)[0], folders
        assert f"give {root / train} as ROOT, and --val_root {root}" in str(caught.value) and val
    assert not (tmp_path / "out").exists()


def test_a_class_may_be_called_train_beside_others_and_that_is_said(touch, tmp_path, capsys):
    root = touch("data", **{"train/1.mp4": None, "run/2.mp4": None})
    make_list("folders", root, tmp_path / "out", "--modality", "video")
    assert read_lists(tmp_path / "out", "video")[1] == ["run", "train"]
    assert f"{root}: warning: taken for classes, though named like splits: train\n" in capsys.readouterr().out


def test_video_files_are_no_frames_and_the_error_names_the_key(touch, tmp_path):
    root = touch("data", **{"a/1.mp4": None})
    with pytest.raises(DataError, match=r"no folders of frames .*; video files need --modality video \(data.modality"):
        make_list("folders", root, tmp_path / "out")


def test_classes_without_a_training_video_are_named(touch, tmp_path, capsys):
    root = touch("videos", **{"1.webm": None})
    labels, train = write(tmp_path / "labels.csv", "B\nA\nC\n"), write(tmp_path / "train.csv", "1;B\n")
    options = ["--train", train, "--labels", labels, "--modality", "video"]
    make_list("something-v1", root, tmp_path / "out", *options)
    assert "warning: classes without a training video (2): A, C\n" in capsys.readouterr().out


# Test files, other forms of Kinetics


def test_a_test_file_of_kinetics_without_labels(touch, tmp_path, capsys):
    root = touch("videos", **{"a_000000_000010.mp4": None, "b_3_13.mp4": None, "c.mp4": None})
    test = write(tmp_path / "test.csv", "youtube_id,time_start,time_end,split\na,0,10,test\nb,3,13,test\nc,1,11,test\n")
    out = tmp_path / "out"
    make_list("kinetics", root, out, "--test", test, "--modality", "video")
    assert (out / "test_videos.txt").read_text() == "a_000000_000010.mp4 -1\nb_3_13.mp4 -1\nc.mp4 -1\n"
    assert {path.name for path in out.iterdir()} == {"test_videos.txt"}
    output = capsys.readouterr().out
    assert f"val_root: {root}\n  val_list: {out}/test_videos.txt\n" in output and "3 videos without labels" in output
    for part in ("train", "val"):
        with pytest.raises(DataError, match="test.csv:1: the header must name label, .*, but label is missing"):
            make_list("kinetics", root, out, f"--{part}", test, "--modality", "video")


def test_a_test_file_beside_the_others_has_its_own_root_and_their_classes(touch, tmp_path, capsys):
    root = touch("videos", **{"1_000000_000010.mp4": None, "2_000000_000010.mp4": None})
    test_root = touch("tests", **{"3_000000_000010.mp4": None})
    files = [write(tmp_path / f"{i}.csv", f"{HEADER}{label},{i},0,10\n") for i, label in ((1, "b"), (2, "b"), (3, "a"))]
    options = [
        value for part, file in zip(("train", "val", "test"), files, strict=True) for value in (f"--{part}", file)
    ]
    make_list("kinetics", root, tmp_path / "out", *options, "--test_root", test_root, "--modality", "video")
    assert (tmp_path / "out" / "train_videos.txt").read_text() == "1_000000_000010.mp4 1\n"
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "3_000000_000010.mp4 0\n"
    output = capsys.readouterr().out
    assert f"val_list: {tmp_path}/out/val_videos.txt\n" in output
    assert f"for a test: data.val_root={test_root} data.val_list={tmp_path}/out/test_videos.txt\n" in output


def test_a_test_list_without_labels_is_not_offered_for_validation(touch, tmp_path, capsys):
    """Training would refuse it."""
    root = touch("videos", **{"1_000000_000010.mp4": None, "2_000000_000010.mp4": None})
    train = write(tmp_path / "train.csv", f"{HEADER}a,1,0,10\n")
    test = write(tmp_path / "test.csv", "youtube_id,time_start,time_end\n2,0,10\n")
    make_list("kinetics", root, tmp_path / "out", "--train", train, "--test", test, "--modality", "video")
    output = capsys.readouterr().out
    assert "  val_list" not in output
    assert f"for a test: data.val_root={root} data.val_list={tmp_path}/out/test_videos.txt\n" in output


def test_a_subset_that_is_no_part_is_one_line(touch, tmp_path):
    entries = {name: {"annotations": {"label": "x"}, "subset": s} for name, s in (("a", "train"), ("b", "held"))}
    file = write(tmp_path / "k.json", json.dumps(entries))
    with pytest.raises(DataError, match="k.json: entry b: the subset must be train, val or test, got 'held'"):
        make_list("kinetics", touch("videos", **{"a.mp4": None}), tmp_path / "out", "--train", file)


@pytest.mark.parametrize("wrapped", [False, True])
def test_json_files_of_kinetics(touch, tmp_path, wrapped):
    root = touch("videos", **{"a_000003_000013.mp4": None, "b.mp4": None, "c.mp4": None})
    entries = {
        "a": {"annotations": {"label": "run", "segment": [3.0, 13.0]}, "duration": 10.0, "subset": "training"},
        "b": {"annotations": {"label": "eat", "segment": [0, 10]}, "subset": "training"},
        "c": {"annotations": {"label": "run"}, "subset": "validate"},
    }
    file = write(
        tmp_path / "k.json", json.dumps({"labels": ["eat", "run"], "database": entries} if wrapped else entries)
    )
    make_list("kinetics", root, tmp_path / "out", "--train", file, "--val", file, "--modality", "video")
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["eat", "run"]
    assert lists["train"] == [("a_000003_000013.mp4", None, "run"), ("b.mp4", None, "eat")]
    assert lists["val"] == [("c.mp4", None, "run")]


@pytest.mark.parametrize(
    "entry", ["3", '{"annotations": []}', '{"annotations": {"segment": [1]}}', '{"annotations": [1]}']
)
def test_json_files_of_another_form_are_one_line(touch, tmp_path, entry):
    root = touch("videos", **{"a.mp4": None})
    with pytest.raises(DataError, match="k.json: entry a: annotations with a label|k.json: entry a: a has no class"):
        make_list("kinetics", root, tmp_path / "out", "--train", write(tmp_path / "k.json", f'{{"a": {entry}}}'))


@pytest.mark.parametrize("time", ["inf", "-inf", "nan", "1e999", ""])
def test_a_time_that_is_no_number_is_one_line(touch, tmp_path, time):
    root = touch("videos", **{"a.mp4": None})
    train = write(tmp_path / "k.csv", f"{HEADER}run,a,{time},11\n")
    with pytest.raises(DataError, match="k.csv:2: times in seconds and 4 columns expected"):
        make_list("kinetics", root, tmp_path / "out", "--train", train, "--modality", "video")


def test_the_test_files_of_something_v2(touch, tmp_path):
    root = touch("videos", **{"7.webm": None, "8.webm": None})
    labels = write(tmp_path / "labels.json", '{"Moving something up": "1", "Holding something": "0"}')
    test = write(tmp_path / "test.json", '[{"id": "8"}, {"id": "7"}]')
    answers = write(tmp_path / "test-answers.csv", "7;Moving something up\n8; Holding [something] \n")
    options = ["--labels", labels, "--modality", "video", "--test"]
    make_list("something-v2", root, tmp_path / "1", *options, test)
    make_list("something-v2", root, tmp_path / "2", *options, answers)
    assert (tmp_path / "1" / "test_videos.txt").read_text() == "8.webm -1\n7.webm -1\n"
    assert (tmp_path / "2" / "test_videos.txt").read_text() == "7.webm 1\n8.webm 0\n"
    for out in ("1", "2"):
        assert (tmp_path / out / "classes.csv").read_text() == "id,name\n0,Holding something\n1,Moving something up\n"
    with pytest.raises(DataError, match="test.json: entry 1: must have an id and a template"):
        make_list("something-v2", root, tmp_path / "3", "--labels", labels, "--train", test)
    mixed = write(tmp_path / "mixed.json", '[{"id": "8"}, {"id": "7", "template": "Holding [something]"}]')
    with pytest.raises(
        DataError, match="mixed.json: entry 1: 8 has no class; in test, either every video has a class, or"
    ):
        make_list("something-v2", root, tmp_path / "3", *options, mixed)


def test_a_test_file_of_something_v1_may_name_the_videos_only(touch, tmp_path):
    root = touch("videos", **{"7.webm": None})
    labels, test = write(tmp_path / "labels.csv", "B\nA\n"), write(tmp_path / "test.csv", "7\n")
    make_list("something-v1", root, tmp_path / "out", "--labels", labels, "--test", test, "--modality", "video")
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "7.webm -1\n"


# Tables

ROWS = [("a/1.mp4", "run", "train"), ("b/1.mp4", "eat, drink", "Training"), ("2.mp4", "run", "dev")]


def as_csv(delimiter):
    quoted = '"{}"'.format
    return "".join(f"{delimiter.join(map(quoted, row))}\n" for row in [("file", "what", "set"), *ROWS])


ENTRIES = [dict(zip(("file", "what", "set"), row, strict=True)) for row in ROWS]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "\ufeff" + as_csv(",")),
        ("t.csv", as_csv(";").replace("\n", "\r\n")),
        ("t.csv", "note,file,set,what\n" + "".join(f'"{"x" * 200_000}",{f},{s},"{w}"\n\n' for f, w, s in ROWS)),
        ("t.tsv", "file\twhat\tset\n" + "".join("\t".join(row) + "\n" for row in ROWS)),
        ("t.txt", as_csv("|")),
        ("t.json", json.dumps(ENTRIES)),
        ("t.json", json.dumps({"version": 2, "videos": ENTRIES})),
        ("t.json", json.dumps({column: [entry[column] for entry in ENTRIES] for column in ENTRIES[0]})),
        ("t.jsonl", "\n".join(map(json.dumps, ENTRIES))),
    ],
)
def test_a_table_gives_lists(touch, tmp_path, name, text):
    root = touch("videos", **{"a/1.mp4": None, "b/1.mp4": None, "c/2.mp4": None})
    options = ["--path", "file", "--label", "what", "--split", "set", "--modality", "video"]
    make_list("table", write(tmp_path / name, text), root, tmp_path / "out", *options)
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["eat, drink", "run"]
    assert lists["train"] == [("a/1.mp4", None, "run"), ("b/1.mp4", None, "eat, drink")]
    assert lists["val"] == [("c/2.mp4", None, "run")]


@pytest.mark.parametrize("text", ["a/1.mp4 10\nb/1.mp4 2\n", "a/1.mp4;10\nb/1.mp4;2\n", "a/1.mp4\t10\nb/1.mp4\t2\n"])
def test_a_table_without_a_header_has_numbered_columns_and_numbers_stay_in_order(touch, tmp_path, text, capsys):
    root = touch("frames", **{"a/1": 3, "b/1": 4})
    make_list("table", write(tmp_path / "t.txt", text), root, tmp_path / "out", "--path", "1", "--label", "2")
    assert (tmp_path / "out" / "classes.csv").read_text() == "id,name\n0,2\n1,10\n"
    assert (tmp_path / "out" / "train.txt").read_text() == "a/1 3 1\nb/1 4 0\n"
    assert "labels do not run from 0" in capsys.readouterr().out


def test_a_json_object_has_its_names_as_the_column_key_and_columns_may_be_nested(touch, tmp_path):
    root = touch("videos", **{"x/v1.mp4": None, "v2.mp4": None})
    entries = {f"v{i}": {"subset": "testing", "annotations": {"label": i}} for i in (1, 2)}
    table = write(tmp_path / "t.json", json.dumps({"database": entries}))
    options = ["--path", "key", "--label", "annotations.label", "--split", "subset", "--modality", "video"]
    make_list("table", table, root, tmp_path / "out", *options)
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "x/v1.mp4 0\nv2.mp4 1\n"


@pytest.mark.parametrize(
    ("content", "path", "label"),
    [
        ({"a/1.mp4": "x", "b/1.mp4": "y"}, "key", "value"),
        ({"x": ["a/1.mp4"], "y": ["b/1.mp4"]}, "value", "key"),
        ([["a/1.mp4", "x"], ["b/1.mp4", "y"]], "1", "2"),
    ],
)
def test_json_without_names_of_columns(touch, tmp_path, content, path, label):
    root = touch("videos", **{"a/1.mp4": None, "b/1.mp4": None})
    table = write(tmp_path / "t.json", json.dumps(content))
    make_list("table", table, root, tmp_path / "out", "--path", path, "--label", label, "--modality", "video")
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["x", "y"] and lists["train"] == [("a/1.mp4", None, "x"), ("b/1.mp4", None, "y")]


def test_a_json_list_of_paths_is_a_test_list(touch, tmp_path):
    root = touch("videos", **{"a/1.mp4": None})
    options = ["--path", "value", "--modality", "video"]
    make_list("table", write(tmp_path / "t.json", '["a/1.mp4"]'), root, tmp_path / "out", *options)
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "a/1.mp4 -1\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", "file,label,set\nv0,0.0,train\nv1,10.0,train\nv2,2.0,train\nv3,,test\n"),
        ("t.csv", "file,label,set\nv0,0,train\nv1,10,train\nv2,2,train\nv3,-1,test\n"),
        ("t.csv", "file,label,set\nd\\v0.mp4,0,train\nv1,10,train\nv2,2,train\nd\\v3,-1,test\n"),
        (
            "t.json",
            '{"file": ["v0", "v1", "v2", "v3"], "label": [0.0, 10.0, 2.0, NaN], '
            '"set": ["train", "train", "train", "test"]}',
        ),
    ],
)
def test_tables_as_pandas_and_windows_write_them(touch, tmp_path, name, text):
    """Whole numbers become 2.0 where a label is missing; a missing label is empty, NaN or -1; folders end with \\."""
    root = touch("videos", **{f"d/v{i}.mp4": None for i in range(4)})
    options = ["--path", "file", "--label", "label", "--split", "set", "--modality", "video"]
    make_list("table", write(tmp_path / name, text), root, tmp_path / "out", *options)
    assert (tmp_path / "out" / "train_videos.txt").read_text() == "d/v0.mp4 0\nd/v1.mp4 2\nd/v2.mp4 1\n"
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "d/v3.mp4 -1\n"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--val_share", "0.5"], "--val_share: .*t.csv names no training videos; a share needs --label"),
        (["--label", "label", "--val_root", "."], "--val_root: .*t.csv names no val videos; --split COLUMN says which"),
        (["--label", "label", "--test_root", "."], "--test_root: .*t.csv names no test videos; --split COLUMN says"),
    ],
)
def test_no_option_of_a_table_is_ignored(touch, tmp_path, options, complaint):
    root = touch("videos", **{"a.mp4": None})
    table = write(tmp_path / "t.csv", "id,label\na,x\n")
    with pytest.raises(UserError, match=complaint):
        make_list("table", table, root, tmp_path / "out", "--path", "id", "--modality", "video", *options)
    assert not (tmp_path / "out").exists()


def test_a_table_without_labels_is_a_test_list(touch, tmp_path):
    root = touch("videos", **{"a.mp4": None})
    make_list(
        "table", write(tmp_path / "t.csv", "id\na\n"), root, tmp_path / "out", "--path", "id", "--modality", "video"
    )
    assert (tmp_path / "out" / "test_videos.txt").read_text() == "a.mp4 -1\n"


def test_a_share_of_a_table_is_held_out(touch, tmp_path):
    root = touch("videos", **{f"{i}.mp4": None for i in range(20)})
    table = write(tmp_path / "t.csv", "id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(20)))
    options = ["--path", "id", "--label", "label", "--modality", "video", "--val_share", "0.2"]
    make_list("table", table, root, tmp_path / "out", *options)
    lists, names = read_lists(tmp_path / "out", "video")
    assert names == ["0", "1"] and len(lists["train"]) == 16 and len(lists["val"]) == 4


def test_the_folder_of_a_tables_path_counts(touch, tmp_path):
    """A name such as 1 is there in many folders, so the same name in another folder is another video."""
    root = touch("videos", **{"b/1.mp4": None, "b/2.mp4": None})
    table = write(tmp_path / "t.csv", "file,label\nvideos/b/2.mp4,y\na/1.mp4,x\n")
    options = ["--path", "file", "--label", "label", "--modality", "video"]
    with pytest.raises(DataError, match="missing.txt: names what is missing: 1 of 2"):
        make_list("table", table, root, tmp_path / "out", *options)
    assert (tmp_path / "out" / "missing.txt").read_text() == f"{table}:3: a/1\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "t.csv: holds no rows|t.csv:1: no column"),
        ("file,label,set\n", "t.csv: holds no rows"),
        ("path,label,set\na,b,train\n", "t.csv:1: no column 'file'; the columns are path, label, set"),
        ("file,label,set\na,b\n", "t.csv:2: 3 columns expected, got 2"),
        ('file,label,set\n"a,b,train\n', "t.csv:2: 3 columns expected, got 1; is a quote not closed"),
        ("file,label,set\n,b,train\n", "t.csv:2: file is empty"),
        ("file,label,set\na,b,somewhere\n", "t.csv:2: set is 'somewhere', but must be one of train, training, val"),
        ("file,label,set\na,,train\n", "t.csv:2: a has no class; in train, every video needs a class"),
        ('[{"file": 1}]', "t.csv: entry 1: no column 'label'; the columns are file"),
        ('[{"file": {}, "label": 1, "set": 2}]', "t.csv: entry 1: the column 'file' must hold one value, got {}"),
        ('{"file": "a", "label": [1, 2], "set": "test"}', "t.csv: entry 1: the column 'label' must hold one value"),
        ('{"a.mp4": 1}', "t.csv: entry 1: no column 'file'; the columns are key, value"),
        ("file,label,set,set\na,b,train,test\n", "t.csv:1: the column 'set' is there more than once; rename one"),
        ("file,label,set\na,-1,train\n", "t.csv:2: a has no class; in train, every video needs a class"),
        ("file,label,set\na,r\0n,train\n", "such a class name cannot stand in classes.csv|not readable as csv"),
        ("[3]", "t.csv: entry 1: no column .file.; the columns are value"),
        ("[", "t.csv: is not valid JSON"),
        ("[" * 100_000, "t.csv: is not valid JSON"),
        ('{"file": [1, 2], "label": [1], "set": []}', "t.csv: the columns .* are of different lengths"),
        ("{}", "t.csv: entry 1: no column 'file'|t.csv: holds no rows"),
        ("file,label,set\na\0,b,train\n", "t.csv:2: a\0 |missing.txt|not readable as csv"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_line(touch, tmp_path, text, complaint):
    root = touch("videos", **{"a.mp4": None})
    options = ["--path", "file", "--label", "label", "--split", "set", "--modality", "video"]
    with pytest.raises(DataError, match=complaint) as caught:
        make_list("table", write(tmp_path / "t.csv", text), root, tmp_path / "out", *options)
    assert "\n" not in caught.value.line


# The end of a pipe


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_the_program_quietly_after_its_work(touch, tmp_path, unbuffered):
    root = touch("videos", **{"a/1.mp4": None})
    program = command("list", "folders", root, tmp_path / "out", "--modality", "video")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(program, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
    assert (tmp_path / "out" / "train_videos.txt").read_text() == "a/1.mp4 0\n"


def test_an_error_is_told_though_nobody_reads_the_output(touch, tmp_path):
    root = touch("videos", **{"a/1.mp4": None, "a/2.txt": None})
    (root / "a" / "1.mp4").write_bytes(b"")
    reader, writer = os.pipe()
    os.close(reader)
    program = command("list", "folders", root, tmp_path / "out", "--modality", "video")
    done = subprocess.run(program, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "1 of 1 videos are not on disk" in done.stderr


def test_a_program_without_an_output_ends_as_usual(touch, tmp_path):
    root = touch("videos", **{"a/1.mp4": None})
    for folder, status in ((root, 0), (tmp_path / "nothing", 1)):
        program = command("list", "folders", folder, tmp_path / "out", "--modality", "video")
        done = subprocess.run(
            ["sh", "-c", '"$@" >&-', "sh", *program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
        )
        assert done.returncode == status and "Traceback" not in done.stderr and done.stderr.count("\n") == status
