"""Packed frames: the same pixels as folders, unchanged files, resumed packing, damage by name."""

import io
import json
import os
import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import frame_archives
from datasets.annotations import read_annotations
from datasets.frame_archives import FrameArchive
from datasets.readers import FrameFolderReader
from engine.configuration import default_config
from inference.inputs import PathReader, find_videos
from tools.check_videos import Task, check_frame_folder
from tools.prepare_data import main
from utils.errors import DataError

TEMPLATE = "img_{:05d}.jpg"


@pytest.fixture
def packed(make_frame_folders, tmp_path):
    root, list_path = make_frame_folders([5, 3])
    Path(root, "video 0", "note.txt").write_text("no frame")
    main(["pack", root, str(tmp_path / "packed"), "--workers", "0"])
    return Path(root), tmp_path / "packed", read_annotations(list_path, 4)


@pytest.mark.parametrize("count_frames", [False, True])
def test_packed_frames_give_the_pixels_and_counts_of_their_folder(packed, count_frames):
    root, out, records = packed
    for record in records:
        videos = [FrameFolderReader(str(r), TEMPLATE, count_frames).open(record) for r in (root, out)]
        assert videos[0].num_frames == videos[1].num_frames == record.num_frames
        for a, b in zip(*(video.read([0, 2]) for video in videos), strict=True):
            assert np.array_equal(a, b)


def test_a_packed_file_holds_the_frame_files_unchanged_as_zipfile_reads_them(packed):
    root, out, _ = packed
    with zipfile.ZipFile(out / "video 0.zip") as archive, FrameArchive(str(out / "video 0.zip")) as frames:
        assert archive.namelist() == list(frames.sizes()) == [TEMPLATE.format(n) for n in range(1, 6)]
        for entry in archive.infolist():
            content = Path(root, "video 0", entry.filename).read_bytes()
            assert entry.compress_type == zipfile.ZIP_STORED
            assert archive.read(entry) == frames.read(entry.filename) == content


def pack_again(root, out, capsys):
    capsys.readouterr()
    main(["pack", str(root), str(out), "--workers", "0"])
    return capsys.readouterr().out


def test_packing_again_skips_what_is_complete_and_replaces_what_is_not(packed, capsys):
    root, out, _ = packed
    whole = (out / "video 1.zip").read_bytes()
    (out / "video 1.zip").write_bytes(whole[:-30])
    (out / ".video 1.zip.unfinished").write_bytes(whole[:50])  # of a run that was killed
    assert "1 videos packed (3 frames, 0.0 MB), 1 were there already, 0 failed" in pack_again(root, out, capsys)
    assert (out / "video 1.zip").read_bytes() == whole
    assert {path.name for path in out.iterdir()} == {"video 0.zip", "video 1.zip"}


@pytest.mark.parametrize("change", ["added", "removed", "resized", "newer"])
def test_a_changed_folder_is_packed_again(packed, capsys, change):
    root, out, _ = packed
    frame = root / "video 1" / TEMPLATE.format(2)
    if change == "added":
        frame.with_name(TEMPLATE.format(4)).write_bytes(frame.read_bytes())
    elif change == "removed":
        frame.with_name(TEMPLATE.format(3)).unlink()
    else:
        frame.write_bytes(frame.read_bytes()[:: -1 if change == "newer" else 2])
        os.utime(frame, ns=(time.time_ns() + 10**9 * (1 if change == "newer" else -(10**6)),) * 2)
    assert "1 videos packed" in pack_again(root, out, capsys)
    with FrameArchive(str(out / "video 1.zip")) as frames:
        assert frames.sizes() == {path.name: path.stat().st_size for path in sorted((root / "video 1").iterdir())}
        assert change == "added" or frames.names() and frames.read(TEMPLATE.format(2)) == frame.read_bytes()


@pytest.mark.parametrize("fault", ["pipe", "broken link", "unreadable"])
def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_packed(packed, capsys, fault):
    root, out, _ = packed
    frame = root / "video 0" / TEMPLATE.format(2)
    frame.unlink()
    os.mkfifo(frame) if fault == "pipe" else frame.symlink_to("nothing" if fault == "broken link" else frame.name)
    (out / "video 1.zip").unlink()
    with pytest.raises(DataError, match="pack_failures.json: 1 of 2 videos could not be packed"):
        pack_again(root, out, capsys)
    (failed,) = json.loads((out / "pack_failures.json").read_text())["failed"]
    assert failed["video"] == str(root / "video 0") and "img_00002.jpg" in failed["reason"]
    assert (out / "video 1.zip").exists()


def test_a_file_that_differs_from_the_frames_after_writing_gets_no_name(packed, capsys, monkeypatch):
    root, out, _ = packed
    (out / "video 1.zip").unlink()
    monkeypatch.setattr(FrameArchive, "read", lambda self, name: b"other")
    with pytest.raises(DataError, match="video 1.zip: is not what was written"):
        pack_again(root, out, capsys)
    assert {path.name for path in out.iterdir()} == {"video 0.zip"}


def test_packing_beside_the_folders_leaves_packed_files_alone(packed, capsys):
    root, _, records = packed
    pack_again(root, root, capsys)
    assert "0 videos packed (0 frames, 0.0 MB), 2 were there already" in pack_again(root, root, capsys)
    shutil.rmtree(root / "video 1")
    assert "0 videos packed (0 frames, 0.0 MB), 1 were there already" in pack_again(root, root, capsys)
    assert len(FrameFolderReader(str(root), TEMPLATE).open(records[1]).read([0, 1, 2])) == 3


def rewritten(path, compression=zipfile.ZIP_STORED, **entries):
    """Write the zip file again with other files, in the order given."""
    with zipfile.ZipFile(path) as archive:
        content = entries or {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def patched(path, place, data):
    """Overwrite bytes, from the end if `place` is negative."""
    content = bytearray(path.read_bytes())
    place %= len(content)
    content[place : place + len(data)] = data
    path.write_bytes(content)


def directory(path):
    return struct.unpack("<L", path.read_bytes()[-6:-2])[0]


DAMAGE = {
    "no zip": lambda path: path.write_bytes(b"PK" * 100),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-30]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "content": lambda path: patched(path, 200, b"\xff\0\xff"),
    "compressed": lambda path: rewritten(path, zipfile.ZIP_DEFLATED),
    "encrypted": lambda path: patched(path, directory(path) + 8, b"\1"),
    "huge frame": lambda path: patched(path, directory(path) + 20, b"\xf0\xff\xff\x7f" * 2),
    "frame behind the end": lambda path: patched(path, directory(path) + 42, b"\xf0\xff\xff\x7f"),
    "large form without its field": lambda path: patched(path, directory(path) + 20, b"\xff" * 8),
    "huge directory": lambda path: patched(path, -10, b"\xf0\xff\xff\x7f"),
    "large form without its record": lambda path: patched(path, -14, b"\xff\xff\xff\xff"),
    "large form at a place without end": lambda path: path.write_bytes(
        b"PK\6\7" + bytes(4) + b"\xff" * 8 + bytes(4) + b"PK\5\6" + bytes(4) + b"\xff" * 12 + bytes(2)
    ),
    "missing": lambda path: rewritten(path, other=b"x"),
    "name outside": lambda path: rewritten(path, **{f"../{TEMPLATE.format(1)}": b"x"}),
    "no image": lambda path: rewritten(path, **{TEMPLATE.format(1): b"text"}),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "link to itself": lambda path: (path.unlink(), path.symlink_to(path)),
}


REASONS = {
    "cut": "is no complete zip file",
    "compressed": "is compressed or encrypted",
    "encrypted": "is compressed or encrypted",
    "huge frame": "it ends behind the end of the contents",
    "frame behind the end": "it ends behind the end of the contents",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_of_a_packed_file_is_one_line_that_names_it(packed, damage):
    _, out, records = packed
    DAMAGE[damage](out / "video 1.zip")
    with pytest.raises(DataError) as caught:
        FrameFolderReader(str(out), TEMPLATE).open(records[1]).read([0])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{out}/video 1") and "listed at " in str(caught.value)
    assert REASONS.get(damage, "") in str(caught.value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_data_names_a_damaged_packed_file(packed, damage):
    _, out, records = packed
    DAMAGE[damage](out / "video 1.zip")
    checked = check_frame_folder(Task("train", str(out), records[1]), TEMPLATE, 1, False)
    findings = checked.findings
    assert checked.digest is None and findings and all("\n" not in finding.message for finding in findings)
    assert findings[0].message.startswith(f"{out}/video 1") and findings[0].severity == "error"


def test_a_long_directory_is_searched_by_bisection_and_unsorted_ones_are_read_whole(tmp_path, monkeypatch):
    names = [TEMPLATE.format(number) for number in range(200)]
    for file, order in (("sorted.zip", names), ("unsorted.zip", names[::-1]), ("uneven.zip", [*names, "x"])):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            for name in order:
                archive.writestr(name, name * 3)
    read = []
    whole = FrameArchive._whole_directory
    monkeypatch.setattr(frame_archives, "LONGEST_DIRECTORY", 1000)
    monkeypatch.setattr(frame_archives, "END_BLOCK", 30)
    monkeypatch.setattr(FrameArchive, "_whole_directory", lambda self: read.append(self.path) or whole(self))
    for file in ("sorted.zip", "unsorted.zip", "uneven.zip"):
        with FrameArchive(str(tmp_path / file)) as frames:
            for name in (names[0], names[77], names[199], names[5]):
                assert frames.read(name) == (name * 3).encode()
    assert {Path(path).name for path in read} == {"unsorted.zip", "uneven.zip"}


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_one_changed_bit_of_a_frame_is_found_by_its_checksum(packed, place):
    root, out, _ = packed
    name, path = TEMPLATE.format(2), out / "video 1.zip"
    frame = (root / "video 1" / name).read_bytes()
    content = bytearray(path.read_bytes())
    content[content.index(frame) + round(place * (len(frame) - 1))] ^= 1
    path.write_bytes(content)
    with FrameArchive(str(path)) as frames:
        assert frames.read(TEMPLATE.format(1)) == (root / "video 1" / TEMPLATE.format(1)).read_bytes()
        with pytest.raises(DataError, match=f"{path}: {name} is damaged: its checksum is not the stated one"):
            frames.read(name)


@pytest.mark.parametrize("end_block", [30, 2**15])
def test_frames_are_read_in_any_order_and_again_from_directories_of_any_length(packed, monkeypatch, end_block):
    root, out, _ = packed
    monkeypatch.setattr(frame_archives, "END_BLOCK", end_block)
    names = [TEMPLATE.format(number) for number in (5, 1, 3, 3, 2, 5, 4)]
    with FrameArchive(str(out / "video 0.zip")) as frames:
        for name in names:
            assert frames.read(name) == Path(root, "video 0", name).read_bytes()


def test_a_name_that_is_part_of_another_is_not_mistaken_for_it(tmp_path):
    names = ["a1.jpg", "1.jpg", "11.jpg", "1.jpg.jpg"]
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for name in names:
            archive.writestr(name, f"of {name}")
    with FrameArchive(str(tmp_path / "v.zip")) as frames:
        for name in [*names, *names[::-1]]:
            assert frames.read(name) == f"of {name}".encode()
        for name in ("jpg", ".jpg", "a1", "1.jp"):
            with pytest.raises(FileNotFoundError):
                frames.read(name)


def test_zip_files_of_other_programs_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for number in range(1, 4):
            with archive.open(zipfile.ZipInfo(TEMPLATE.format(number)), "w", force_zip64=True) as file:
                file.write(b"frame" * number)
    with FrameArchive(str(tmp_path / "v.zip")) as frames:
        assert [frames.read(TEMPLATE.format(number)) for number in (3, 1)] == [b"frame" * 3, b"frame"]
        with pytest.raises(FileNotFoundError):
            frames.read(TEMPLATE.format(4))


def test_lists_of_packed_frames_are_those_of_the_folders(packed, tmp_path, capsys):
    root, out, _ = packed
    for each in (root, out):
        for video in ("video 0", "video 1"):
            suffix = ".zip" if each is out else ""
            (each / "run").mkdir(exist_ok=True)
            (each / f"{video}{suffix}").rename(each / "run" / f"{video}{suffix}")
    (out / "run" / "broken.zip").write_bytes(b"PK")
    for each in (root, out):
        main(["list", "folders", str(each), str(tmp_path / each.name)])
    folders, archives = ((tmp_path / each.name / "train.txt").read_text() for each in (root, out))
    assert folders == archives == "run/video 0 5 0\nrun/video 1 3 0\n"
    assert "zip files that are not complete (1): run/broken.zip" in capsys.readouterr().out


def test_predict_finds_packed_frames_by_path_by_directory_and_by_list(packed, tmp_path):
    root, out, _ = packed
    path = tmp_path / "videos.txt"
    path.write_text("video 1 3 0\nvideo 0\nvideo 0.zip\n")
    (out / "other.zip").write_bytes(zip_of("note.txt"))
    records = find_videos([out / "video 0.zip", out, path], TEMPLATE, out)
    names = ["video 0.zip", "video 0.zip", "video 1.zip", "video 1", "video 0", "video 0.zip"]
    assert [record.path for record in records] == [str(out / name) for name in names]
    reader = PathReader(default_config(data={"image_tmpl": TEMPLATE}).data)
    for record in records:
        video = reader.open(record)
        folder = root / Path(record.path).name.removesuffix(".zip")
        assert video.num_frames == len(list(folder.glob("*.jpg")))
        assert np.array_equal(video.read([1])[0], np.asarray(Image.open(folder / TEMPLATE.format(2))))
    (out / "video 0").mkdir()
    assert [r.path for r in find_videos([out], TEMPLATE)] == [str(out / "video 1.zip")]


def zip_of(name):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, "x")
    return file.getvalue()
