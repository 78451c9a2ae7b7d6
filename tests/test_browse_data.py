"""tools/browse_data.py: its rows are the clips and views that the model gets, and its notes say what was drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import epoch_batches, loader_config, spoil_packets, write_packets, write_video

from datasets.batch_augment import BatchAugment
from datasets.loaders import build_eval_loader, build_train_loader
from datasets.resample import Resample, bilinear
from engine.configuration import read_config
from engine.loops import train_one_epoch
from tools import browse_data, prepare_data
from utils.errors import DataError, UserError
from utils.precision import resolve_precision


def rows_of(groups):
    return [row for group in groups for row in group]


def as_frames(clips):
    return [clip.permute(0, 2, 3, 1).numpy() for clip in clips]


@pytest.fixture
def paths(make_frame_folders):
    return make_frame_folders([9, 12, 9, 14, 9, 9, 11, 10], size=(53, 38))


def test_without_batch_augmentation_the_rows_are_the_loaders_clips(paths):
    config = loader_config(paths, num_sample=2, num_segments=3, rand_aug=True, balance=True)
    rows = rows_of(browse_data.train_rows(config, 2, 9))
    batches = epoch_batches(build_train_loader(config), 2)
    clips = as_frames(torch.cat([batch["clips"] for batch in batches]))[:9]
    assert len(rows) == 9 and all(np.array_equal(row.clip, clip) for row, clip in zip(rows, clips, strict=True))
    for row, label in zip(rows, torch.cat([batch["labels"] for batch in batches]).tolist(), strict=False):
        assert row.lines[0].endswith(f": label {label}")


def test_the_box_the_flip_and_the_frames_in_the_notes_make_the_pixels(paths):
    """The box is cut from the frame that the notes name and resized once; the rest is a flip and grey."""
    config = loader_config(paths, num_segments=3, resize=38, balance=True)  # the frames keep their size
    rows, seen = rows_of(browse_data.train_rows(config, 0, 8)), set()
    for row in rows:
        (left, upper, right, lower) = row.boxes[0]
        out = np.empty((3, 16, 16), np.uint8)
        Resample(bilinear(right - left, 16), bilinear(lower - upper, 16))(
            np.ascontiguousarray(row.frame[upper:lower, left:right]), out
        )
        pixels = out.transpose(1, 2, 0)
        if flipped := "flipped" in row.lines[1]:
            pixels = pixels[:, ::-1]
        if "grey" in row.lines[1]:
            pixels = np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L").convert("RGB"))
        assert np.abs(pixels.astype(int) - row.clip[1]).max() <= 1
        seen.add(flipped)
    assert seen == {False, True}


def test_the_rows_are_what_enters_the_model_in_training(config, monkeypatch, tmp_path):
    """train_one_epoch with a model that keeps its input, with erasing, mixing and two clips of each video."""
    overrides = ["data.rand_erase=True", "solver.mixup=True", "data.num_sample=2", "data.rand_aug=True"]
    resolved = read_config(config, overrides)
    given = []

    class Keeper(torch.nn.Linear):
        def forward(self, clips):
            given.append(clips.clone())
            return super().forward(torch.zeros(len(clips), 1))

    loader, model = build_train_loader(resolved), Keeper(1, 10)
    model.no_sync = None
    model.__dict__["trained"] = model  # all of it, without a cycle of modules
    precision = resolve_precision("fp32", torch.device("cpu"))
    loader.sampler.set_epoch(1)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "base_lr": 0.1}])
    train_one_epoch(model, loader, optimizer, precision.grad_scaler(), precision, 1, resolved)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (resolved.data.mean, resolved.data.std))
    pixels = as_frames(((torch.cat(given) * std + mean) * 255).round().clamp(0, 255).byte())
    rows = rows_of(browse_data.train_rows(resolved, 1, 100))
    assert len(rows) == len(pixels) == 32
    assert all(np.array_equal(row.clip, clip) for row, clip in zip(rows, pixels, strict=True))
    notes = " ".join(row.lines[1] for row in rows)
    for number, row in enumerate(rows):  # batches of eight clips, paired back to front
        assert row.lines[0].startswith(f"clip {number}: ")
        partner = number // 8 * 8 + 7 - number % 8
        assert not re.search(r"(from|with) clip", row.lines[1]) or f" clip {partner} (" in row.lines[1]
    assert "erased" in notes and ("cutmix" in notes or "mixup" in notes)


def test_mixing_is_named_with_its_partner_and_its_box():
    own, other = torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)
    cut = own.clone()
    cut[..., 2:5, 1:7] = 1
    assert browse_data.mixing(own, own, other, 7) == []
    assert browse_data.mixing(cut, own, other, 7) == ["6 x 3 at (1, 2) cut from clip 7 (cutmix)"]
    assert browse_data.mixing(0.7 * own + 0.3 * other, own, other, 7) == ["blended with clip 7 (mixup)"]


def test_shares_of_mixed_labels_are_those_of_the_targets_without_smoothing(paths):
    config = loader_config(paths, batch_size=2, num_classes=4)
    config.solver.mixup = True
    batch = {"clips": torch.randint(0, 256, (2, 2, 3, 16, 16), dtype=torch.uint8), "labels": torch.tensor([0, 3])}
    _, shares, _ = browse_data.augmented(config, batch, 0, 0)
    augment = BatchAugment(4, 0.1, False, True, torch.device("cpu"))
    _, targets = augment(torch.zeros(2, 2, 3, 16, 16), batch["labels"], 11, 0, 0, 0)
    assert shares.sum(1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert (0.9 * shares + 0.025).flatten().tolist() == pytest.approx(targets.flatten().tolist(), abs=1e-6)


def test_views_are_those_of_the_loader_and_their_boxes_are_in_the_frame(paths):
    config = loader_config(paths, num_segments=3, resize=38, min_frames=10)
    groups = list(browse_data.eval_rows(config, 100, 3, 2))
    dataset = build_eval_loader(config, clips=2, crops=3, every_video=True).dataset
    views = [dataset[index]["clips"] for index in range(8)]
    assert len(groups) == 8  # a test scores short videos too
    for group, clips in zip(groups, views, strict=True):
        assert all(np.array_equal(row.clip, clip) for row, clip in zip(group, as_frames(clips), strict=True))
        for row in group:
            left, upper, right, lower = row.boxes[0]
            assert np.array_equal(row.frame[upper:lower, left:right], row.clip[1]) and len(row.boxes) == 3


def test_mirrored_views_are_marked(paths):
    (group,) = browse_data.eval_rows(loader_config(paths, resize=38), 1, 10, 1)
    assert [", mirrored;" in row.lines[1] for row in group] == [False] * 5 + [True] * 5
    assert [row.boxes[0] for row in group[:5]] == [row.boxes[0] for row in group[5:]]


def test_a_replaced_video_is_named(paths, tmp_path):
    for file in (tmp_path / "frames" / "video 4").iterdir():
        file.write_bytes(b"")
    rows = rows_of(browse_data.train_rows(loader_config(paths, on_error="skip"), 0, 8))
    assert sum("instead of video 4, which cannot be read" in row.lines[2] for row in rows) == 1


def test_video_files_without_names_or_labels_can_be_browsed(tmp_path, capsys, config):
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", number, 6)
    (tmp_path / "v.txt").write_text("".join(f"{number}.mp4 -1\n" for number in range(3)))
    overrides = ["data.modality=video", f"data.val_root={tmp_path}", f"data.val_list={tmp_path / 'v.txt'}"]
    browse_data.main(
        [config, str(tmp_path / "out"), "--split", "val", "--clips", "2", "data.label_list=None", *overrides]
    )
    (path,) = (tmp_path / "out").iterdir()
    assert capsys.readouterr().out == f"{path}: 2 clips\n"
    assert Image.open(path).format == "PNG"


@pytest.mark.parametrize("packed", [False, True])
def test_segments_of_frames_in_folders_and_packed_are_shown_by_name_with_their_own_frames(paths, tmp_path, packed):
    root, path = Path(paths[0]), tmp_path / "segments.txt"
    path.write_text("".join(f"video 3 {first} 5 {first % 4}\n" for first in range(8)))
    if packed:
        prepare_data.main(["pack", str(root), str(tmp_path / "packed"), "--workers", "0"])
    config = loader_config((str(tmp_path / "packed" if packed else root), str(path)), segments=True, num_segments=3)
    dataset = build_eval_loader(config, clips=2, crops=3).dataset
    groups = list(browse_data.eval_rows(config, 100, 3, 2))
    firsts = set()
    for rows in [*groups, rows_of(browse_data.train_rows(config, 0, 8))]:
        for row in rows:
            note = re.search(r"video 3 (\d) 5 \((.*segments.txt:\d)\), frames ([\d ]+) of 5", " ".join(row.lines))
            first, shown = int(note[1]), [int(number) for number in note[3].split()]
            firsts.add(first)
            with Image.open(root / "video 3" / f"img_{first + shown[1] + 1:05d}.jpg") as middle:
                size = row.frame.shape[1::-1]
                assert np.array_equal(row.frame, np.asarray(middle.resize(size, Image.Resampling.BICUBIC)))
    assert firsts == set(range(8))
    clips = {row.clip.tobytes() for group in groups for row in group}
    assert clips == {clip.tobytes() for index in range(8) for clip in as_frames(dataset[index]["clips"])}


def test_a_video_that_loses_frames_to_damage_is_shown_as_the_loader_reads_it(tmp_path):
    write_packets(tmp_path / "v.webm", 30, "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"})
    spoil_packets(tmp_path / "v.webm", range(20, 30))
    (tmp_path / "whole.txt").write_text("v.webm 0\n" * 2)
    (tmp_path / "segments.txt").write_text("v.webm 5 25 0\n" * 2)
    for name in ("whole", "segments"):
        keys = {"modality": "video", "decoder": "pyav", "segments": name == "segments", "num_segments": 3}
        config = loader_config((str(tmp_path), str(tmp_path / f"{name}.txt")), **keys)
        (rows, _) = browse_data.eval_rows(config, 2, 1, 2)
        sample = build_eval_loader(config, clips=2).dataset[0]
        assert sample["damaged"] and int(sample["num_frames"]) < (30 if name == "whole" else 25)
        assert all(f" of {int(sample['num_frames'])}" in row.lines[1] for row in rows)
        assert all(np.array_equal(row.clip, clip) for row, clip in zip(rows, as_frames(sample["clips"]), strict=True))
        assert len(rows_of(browse_data.train_rows(config, 0, 2))) == 2


def test_sheets_of_both_lists_are_written_and_a_broken_video_leaves_no_half_of_one(config, tmp_path, motion_root):
    out = tmp_path / "new" / "out"
    browse_data.main([config, str(out), "--clips", "10", "--epoch", "3"])
    names = sorted(path.name for path in out.iterdir())
    assert names == ["train_epoch3_01.png", "train_epoch3_02.png", "val_1x1_01.png"]
    (tmp_path / "l.txt").write_text("gone 6 1\n" * 4)
    with pytest.raises(DataError, match="gone"):
        browse_data.main([config, str(tmp_path / "other"), f"data.train_list={tmp_path / 'l.txt'}"])
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
    with pytest.raises(UserError, match="tiny.yaml"):
        browse_data.main([config, config])
