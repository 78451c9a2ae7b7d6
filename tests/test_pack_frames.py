"""Packed frames: the same pixels as folders, unchanged files, resumed packing, damage by name."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from datasets.annotations import read_annotations
from datasets.frame_archives import FrameArchive
from datasets.readers import FrameFolderReader
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


def test_packing_again_skips_what_is_complete_and_replaces_what_is_not(packed, capsys):
    root, out, _ = packed
    whole = (out / "video 1.zip").read_bytes()
    (out / "video 1.zip").write_bytes(whole[:-30])
    main(["pack", str(root), str(out), "--workers", "0"])
    assert "1 videos packed, 1 were there already, 0 failed" in capsys.readouterr().out
    assert (out / "video 1.zip").read_bytes() == whole


@pytest.mark.parametrize("damage", ["changed", "cut", "compressed", "missing"])
def test_damage_of_a_packed_file_is_an_error_that_names_it(packed, damage):
    root, out, records = packed
    path = out / "video 1.zip"
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[200] ^= 255
    elif damage == "cut":
        content = content[:-30]
    path.write_bytes(content)
    if damage in ("compressed", "missing"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            if damage == "compressed":
                archive.write(root / "video 1" / TEMPLATE.format(1), TEMPLATE.format(1))
    with pytest.raises(DataError, match="video 1") as caught:
        FrameFolderReader(str(out), TEMPLATE).open(records[1]).read([0])
    assert "\n" not in str(caught.value)
