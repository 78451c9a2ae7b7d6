"""Frame folders and data sets: decoded pixels, the memory of frames, samples of training and evaluation."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import eval_transform, random_frame, train_clip, train_transform

from datasets.annotations import VideoRecord, read_annotations
from datasets.readers import FrameBuffers, FrameFolderReader, OpenedVideo, decode_image
from datasets.sampling import sample_test
from datasets.transforms import TrainTransform
from datasets.video_dataset import EvalVideoDataset, TrainVideoDataset
from utils.errors import DataError
from utils.seeding import sample_rng


def make_dataset(cls, paths, transform, protocol="kinetics", **options):
    root, list_path = paths
    return cls(
        records=read_annotations(list_path, 4),
        class_names=None,
        reader=FrameFolderReader(root, "img_{:05d}.jpg"),
        protocol=protocol,
        num_segments=4,
        transform=transform,
        **options,
    )


def train_dataset(paths, **options):
    return make_dataset(TrainVideoDataset, paths, train_transform("kinetics", 32, {0: 1, 1: 0}), seed=3, **options)


def eval_dataset(paths, num_crops=1, **options):
    return make_dataset(EvalVideoDataset, paths, eval_transform("kinetics", 32, num_crops), **options)


class CountingReader(FrameFolderReader):
    """Records the indices that are read, and how many videos are open."""

    def __init__(self, root, image_tmpl="img_{:05d}.jpg"):
        super().__init__(root, image_tmpl)
        self.asked = []
        self.opened = 0

    def open(self, record):
        video = super().open(record)
        self.opened += 1

        def read(indices):
            self.asked.append(list(indices))
            return video.read(indices)

        def close():
            self.opened -= 1
            video.close()

        return OpenedVideo(video.num_frames, read, close)


# Pixels of frame files


def test_index_zero_is_the_file_with_number_one(make_frame_folders):
    root, list_path = make_frame_folders([3])
    (record,) = read_annotations(list_path, 4)
    frames = FrameFolderReader(root, "img_{:05d}.jpg").open(record).read([2, 0])
    for frame, number in zip(frames, (3, 1), strict=True):
        assert frame.shape == (32, 40, 3) and frame.dtype == np.uint8 and frame.flags.c_contiguous
        with Image.open(f"{root}/video 0/img_{number:05d}.jpg") as expected:
            assert np.array_equal(np.asarray(frame), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB"])
def test_frames_of_any_mode_are_converted_to_rgb_as_by_pillow(tmp_path, mode):
    image = random_frame((1,), (21, 17)).convert(mode)
    image.save(tmp_path / "img_00001.png")
    (frame,) = FrameFolderReader(str(tmp_path), "img_{:05d}.png").open(VideoRecord("", 1, 0, "list.txt:1")).read([0])
    with Image.open(tmp_path / "img_00001.png") as saved:
        assert np.array_equal(frame, np.asarray(saved.convert("RGB")))


KINDS_OF_JPEG = {
    "full colour": {"subsampling": "4:4:4"},
    "half of the colour": {"subsampling": "4:2:2"},
    "a quarter of the colour": {"subsampling": "4:2:0"},
    "rough": {"quality": 3},
    "progressive": {"progressive": True},
    "optimised, with restart markers": {"optimize": True, "restart_marker_blocks": 3},
    "colours kept": {"keep_rgb": True, "subsampling": "4:4:4"},
    "turned by its metadata": {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"},
    "with a profile and a comment": {"icc_profile": b"profile", "comment": b"comment"},
}


@pytest.mark.parametrize("size", [(53, 38), (16, 16), (1, 1), (17, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("kind", KINDS_OF_JPEG)
def test_every_kind_of_jpeg_gives_the_pixels_of_pillow(kind, mode, size):
    file = io.BytesIO()
    options = {name: value for name, value in KINDS_OF_JPEG[kind].items() if mode == "RGB" or name != "keep_rgb"}
    random_frame((1,), size).convert(mode).save(file, "jpeg", **options)
    for data in (file.getvalue(), file.getvalue() + b"more"):
        frame, _ = decode_image(data, FrameBuffers([]))
        assert frame.flags.c_contiguous and frame.dtype == np.uint8
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(frame, np.asarray(image.convert("RGB")))


def test_a_damaged_jpeg_gives_the_pixels_or_the_error_of_pillow():
    file = io.BytesIO()
    random_frame((1,), (53, 38)).save(file, "jpeg")
    whole, rng, errors = file.getvalue(), np.random.default_rng(0), 0
    damaged = [whole[:length] for length in range(2, len(whole), 23)]
    for _ in range(60):
        place = int(rng.integers(2, len(whole)))
        damaged.append(whole[:place] + rng.bytes(3) + whole[place + 3 :])
    for data in damaged:
        try:
            with Image.open(io.BytesIO(data)) as image:
                expected = np.asarray(image.convert("RGB"))
        except Exception:
            errors += 1
            with pytest.raises((OSError, SyntaxError, ValueError, EOFError, struct.error)):
                decode_image(data, FrameBuffers([]))
        else:
            assert np.array_equal(decode_image(data, FrameBuffers([]))[0], expected)
    assert 20 < errors < len(damaged)


# Memory of frames


def test_frames_keep_their_pixels_until_their_video_is_closed(make_frame_folders):
    root, list_path = make_frame_folders([5] * 4)
    reader, (first, second, *others) = FrameFolderReader(root, "img_{:05d}.jpg"), read_annotations(list_path, 4)
    with reader.open(first) as opened, reader.open(second) as never_closed:
        held = [*opened.read(range(5)), *never_closed.read(range(5))]
        copies = [frame.copy() for frame in held]
        views = [frame[1:, 2:] for frame in held]
        tensors = [torch.from_numpy(frame) for frame in held]
        del held
        for record in others * 3:
            with reader.open(record) as video:
                video.read(range(5))
        for copy, view, tensor in zip(copies, views, tensors, strict=True):
            assert np.array_equal(view, copy[1:, 2:]) and np.array_equal(tensor.numpy(), copy)


def test_videos_that_are_open_at_once_never_share_memory_and_closed_ones_give_theirs_to_the_next(make_frame_folders):
    root, list_path = make_frame_folders([3] * 3)
    reader, records = FrameFolderReader(root, "img_{:05d}.jpg"), read_annotations(list_path, 4)
    first, second, third = (reader.open(record) for record in records)
    frames, others = first.read(range(3)), second.read(range(3))
    both = frames + others
    for number, frame in enumerate(both):
        assert not any(np.may_share_memory(frame, other) for other in both[number + 1 :])
    addresses, pixels = {frame.ctypes.data for frame in frames}, [frame.copy() for frame in others]
    first.close()
    first.close()  # must not give the memory back a second time
    again, more = third.read(range(3)), reader.open(records[0]).read(range(3))
    assert {frame.ctypes.data for frame in again} == addresses
    assert not any(np.may_share_memory(frame, other) for frame in more for other in again + others)
    assert all(np.array_equal(frame, kept) for frame, kept in zip(others, pixels, strict=True))


def test_a_video_that_is_never_closed_keeps_its_frames(make_frame_folders):
    root, list_path = make_frame_folders([3] * 2)
    reader, (first, second) = FrameFolderReader(root, "img_{:05d}.jpg"), read_annotations(list_path, 4)
    frames = reader.open(first).read(range(3))
    copies = [frame.copy() for frame in frames]
    for _ in range(3):
        with reader.open(second) as video:
            video.read(range(3))
    assert np.array_equal(frames, copies)


def test_memory_is_used_again_and_does_not_pile_up():
    free = []
    first, second = FrameBuffers(free), FrameBuffers(free)
    address = first.take(100).ctypes.data
    assert second.take(100).ctypes.data != address
    first.release()
    assert second.take(60).ctypes.data == address
    second.release()
    for size in range(100, 2000, 10):
        block = first.take(size)
        assert block.dtype == np.uint8 and block.ndim == 1 and len(block) >= size
        first.release()
    assert len(free) <= 3


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_data_sets_close_a_video_after_its_clip_and_after_an_error(make_frame_folders, part, broken):
    paths = make_frame_folders([5])
    dataset, key = (train_dataset(paths), (0, 0)) if part == "training" else (eval_dataset(paths), 0)
    dataset.reader = CountingReader(paths[0])
    if broken:
        for number in range(1, 6):
            break_empty(os.path.join(paths[0], "video 0", f"img_{number:05d}.jpg"))
        with pytest.raises(DataError):
            dataset[key]
    else:
        dataset[key]
    assert dataset.reader.asked and dataset.reader.opened == 0


# Names and damage of frame files


@pytest.mark.parametrize("image_tmpl", ["img_{:05d}.jpg", "jpg/f.{}+", "{0:03d}_{0}.jpg"])
def test_the_files_that_are_named_like_the_template_are_counted(tmp_path, image_tmpl):
    folder, name = (tmp_path / "clip" / image_tmpl).parent, os.path.basename(image_tmpl)
    folder.mkdir(parents=True)
    for number in range(1, 13):
        Image.new("RGB", (8, 8)).save(folder / name.format(number), format="JPEG")
    for other in ("flow_00001.jpg", "img_x.jpg", "img_00001.jpg.bak", "fx1+", "thumbs.db", "001_1.png"):
        (folder / other).touch()
    record = VideoRecord("clip", 3, 0, "list.txt:1")
    video = FrameFolderReader(str(tmp_path), image_tmpl, count_frames=True).open(record)
    assert video.num_frames == 12 and len(video.read([11])) == 1
    assert FrameFolderReader(str(tmp_path), image_tmpl).open(record).num_frames == 3
    (folder / name.format(12)).unlink()
    (folder / name.format(5)).unlink()
    video = FrameFolderReader(str(tmp_path), image_tmpl, count_frames=True).open(record)
    with pytest.raises(DataError, match="frame missing; listed at list.txt:1 with 10 frames, as counted"):
        video.read([4])


@pytest.mark.parametrize("folder", ["empty", "gone"])
def test_a_folder_without_frames_is_an_error_when_frames_are_counted(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "00001.jpg").touch()
    reader = FrameFolderReader(str(tmp_path), "img_{:05d}.jpg", count_frames=True)
    with pytest.raises(DataError, match=f"{folder}: no file like img_.*; listed at list.txt:7; check"):
        reader.open(VideoRecord(folder, 3, 0, "list.txt:7"))


def break_missing(path):
    os.remove(path)


def break_truncated(path):
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) * 2 // 3)


def break_text(path):
    with open(path, "w") as file:
        file.write("not a picture")


def break_empty(path):
    open(path, "w").close()


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (break_missing, "frame missing"),
        (break_truncated, "frame unreadable"),
        (break_text, "frame unreadable"),
        (break_empty, "frame unreadable"),
    ],
)
def test_a_broken_frame_is_named_with_its_place_in_the_list(make_frame_folders, damage, problem):
    root, list_path = make_frame_folders([4, 4])
    path = os.path.join(root, "video 1", "img_00003.jpg")
    damage(path)
    for dataset, key in (
        (train_dataset((root, list_path), random_shift=False), (0, 1)),
        (eval_dataset((root, list_path)), 1),
    ):
        with pytest.raises(DataError) as caught:
            dataset[key]
        assert caught.value.line.startswith(f"{path}: {problem}")
        assert f"listed at {list_path}:2 with 4 frames" in caught.value.line
        assert "\n" not in str(caught.value)


# Training


def test_a_training_sample_is_a_function_of_seed_epoch_and_index(make_frame_folders):
    paths = make_frame_folders([30, 30])
    first, again = train_dataset(paths), train_dataset(paths)
    for key in ((0, 0), (1, 0), (0, 1)):
        assert torch.equal(first[key]["clips"], again[key]["clips"])
    assert not torch.equal(first[0, 0]["clips"], first[1, 0]["clips"])
    again.seed = 4
    assert not torch.equal(first[0, 0]["clips"], again[0, 0]["clips"])


def test_a_training_sample_does_not_touch_the_global_generators(make_frame_folders):
    dataset = train_dataset(make_frame_folders([30]))
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    dataset[0, 0]
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


def test_every_repeat_of_a_training_sample_is_augmented_by_its_own_generator(make_frame_folders):
    dataset = train_dataset(make_frame_folders([30, 30, 30]), num_sample=2)
    sample = dataset[0, 2]
    assert sample["clips"].shape == (2, 4, 3, 32, 32)
    assert sample["clips"].dtype == torch.uint8
    assert sample["clips"].is_contiguous()
    assert sample["labels"].tolist() == [2, 2]
    assert sample["labels"].dtype == sample["indices"].dtype == torch.int64
    assert sample["indices"].tolist() == [2]
    frames = dataset.reader.open(dataset.records[2]).read(range(30))
    frames = [frames[index] for index in dataset.sample(30, 0, 2)]
    for repeat, clip in enumerate(sample["clips"]):
        expected, _ = train_clip(dataset.transform, frames, 2, sample_rng(3, 0, 2, repeat))
        assert torch.equal(clip, expected)


def test_repeats_share_their_frames_but_not_their_augmentation(make_frame_folders, monkeypatch):
    paths = make_frame_folders([30])
    one, two = train_dataset(paths), train_dataset(paths, num_sample=2)
    two.reader = CountingReader(paths[0])
    first, second = two[5, 0]["clips"]
    assert torch.equal(first, one[5, 0]["clips"][0])
    assert not torch.equal(first, second)
    assert two.reader.asked == [one.sample(30, 5, 0).tolist()]
    seen = []
    monkeypatch.setattr(TrainTransform, "__call__", lambda self, frames, *_: seen.append(frames) or 0)
    two[5, 0]
    first, second = seen
    assert all(a is b for a, b in zip(first, second, strict=True))


def test_each_repeat_follows_its_own_flip(make_frame_folders):
    dataset = train_dataset(make_frame_folders([4]), num_sample=8)
    labels = torch.cat([dataset[epoch, 0]["labels"] for epoch in range(4)])
    assert set(labels.tolist()) == {0, 1}


def test_a_frame_that_a_clip_repeats_is_read_once(make_frame_folders):
    dataset = train_dataset(paths := make_frame_folders([2]))
    dataset.reader = CountingReader(paths[0])
    clips = dataset[0, 0]["clips"][0]
    indices = dataset.sample(2, 0, 0).tolist()
    assert dataset.reader.asked == [[0, 1]]
    for t, index in enumerate(indices):
        assert torch.equal(clips[t], clips[indices.index(index)])
    assert not torch.equal(clips[0], clips[-1])


@pytest.mark.parametrize("dense", [False, True])
def test_without_random_shift_training_takes_the_frames_of_validation(make_frame_folders, dense):
    dataset = train_dataset(make_frame_folders([30]), random_shift=False, dense=dense)
    expected = sample_test(30, 4, "kinetics", dense=dense)[0].tolist()
    assert all(dataset.sample(30, epoch, 0).tolist() == expected for epoch in range(3))


def test_dense_training_takes_dense_frames(make_frame_folders):
    dataset = train_dataset(make_frame_folders([5]), dense=True)
    assert dataset.sample(5, 0, 0).tolist() == [0, 2, 4, 1]


# Evaluation


def test_the_views_of_a_video_are_its_clips_crop_by_crop(make_frame_folders):
    paths = make_frame_folders([30, 21], size=(60, 40))
    dataset = eval_dataset(paths, num_crops=3, num_clips=2)
    sample = dataset[1]
    assert sample["clips"].shape == (6, 4, 3, 32, 32)
    assert sample["clips"].is_contiguous()
    assert sample["labels"].tolist() == sample["indices"].tolist() == [1]
    transform = eval_transform("kinetics", 32, 3)
    for clip, indices in enumerate(sample_test(21, 4, "kinetics", 2)):
        crops = transform(dataset.reader.open(dataset.records[1]).read(indices.tolist()))
        for crop in range(3):
            assert torch.equal(sample["clips"][crop * 2 + clip], crops[crop])


def test_a_frame_that_clips_share_is_read_once(make_frame_folders):
    dataset = eval_dataset(paths := make_frame_folders([3]), num_clips=4)
    dataset.reader = CountingReader(paths[0])
    assert dataset[0]["clips"].shape == (4, 4, 3, 32, 32)
    assert dataset.reader.asked == [[0, 1, 2]]


def test_an_evaluation_sample_equals_pillow_on_the_frames_of_validation(make_frame_folders):
    root, _ = paths = make_frame_folders([10], size=(50, 40))
    clip = eval_dataset(paths)[0]["clips"][0]
    for pixels, number in zip(clip, (1, 3, 6, 8), strict=True):  # int(2.5 i), counted from one
        with Image.open(f"{root}/video 0/img_{number:05d}.jpg") as frame:
            expected = frame.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32))
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), np.asarray(expected))
