"""Compares the project's data sets with the pipeline of benchmarks/plain_pipeline.py, in clips per second.

    python -m benchmarks.data_engine [--only WORDS] [--material FOLDER]

Both run in turns in one process with one thread, on the same generated files and with the same random draws. Results
are medians over rounds. The run also checks that the pixels of validation and test are bit-equal and that video files
give the same frames. Two more rows compare packed frames with their folder, and a segment far into a long video file
with decoding from the start. Writes benchmarks/results/data_engine.txt, unless `--only` selects the rows whose names
contain WORDS.
"""

import argparse
import hashlib
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch

from benchmarks import plain_pipeline, video_material
from benchmarks.machine import describe_machine
from datasets.annotations import VideoRecord
from datasets.decoders import decode_all, pick
from datasets.flips import SOMETHING_FLIP_PAIRS
from datasets.frame_archives import open_frames
from datasets.readers import FrameFolderReader, Reader, VideoFileReader
from datasets.sampling import sample_test, sample_train
from datasets.transforms import EvalTransform, TrainTransform, normalize_clips, protocol_resize
from datasets.video_dataset import EvalVideoDataset, TrainVideoDataset
from utils.config_schema import FIELDS
from utils.seeding import sample_rng

RESULTS = Path("benchmarks/results/data_engine.txt")
SEED, SEGMENTS, SIZE = 1024, 8, 224
IMAGE_TMPL = "img_{:05d}.jpg"
FOLDERS = {"340x256": (340, 256), "427x240": (427, 240)}
# Name -> width, height, distance of key frames, target of the ratio.
VIDEOS = {
    "340x256, key frame every 250": (340, 256, 250, 1.4),
    "340x256, key frame every 12": (340, 256, 12, 2.0),
    "1280x720, key frame every 250": (1280, 720, 250, 2.0),
}
VIDEOS_OF_A_KIND = 3
PACKED_FRAMES, LONG_FOLDERS, PACKED = 300, "300 frames", "300 frames packed"
LONG_FRAMES, LONG_VIDEO = 15000, "long.mp4"  # ten minutes
PACKED_ROW = f"packed frames, {SEGMENTS} of {PACKED_FRAMES}, 340x256"
SEGMENT_ROW = f"segment near the end of a file of {LONG_FRAMES} frames, 340x256, key frame every 250"
FLIP_LABELS = dict(SOMETHING_FLIP_PAIRS) | {b: a for a, b in SOMETHING_FLIP_PAIRS}


@dataclass(frozen=True)
class Row:
    """One comparison.

    name: first part of the printed line
    goal: target of the ratio of times, or None
    plain, ours: from (epoch, video) to clips (clips, T, 3, H, W), float32 of the plain pipeline and uint8 of ours
    check: from (epoch, video) to a statement of what is equal; raises AssertionError if it is not
    rounds: number of rounds, after one that is not counted
    """

    name: str
    goal: float | None
    plain: Callable[[int, int], torch.Tensor]
    ours: Callable[[int, int], torch.Tensor]
    check: Callable[[int, int], str]
    rounds: int = 9


def train_row(
    name: str,
    goal: float,
    kind: str,
    reader: Reader,
    open_plain: Callable[[int], tuple[int, Callable[[Sequence[int]], list]]],
    protocol: str,
    rand_aug: bool = False,
    repeats: int = 1,
    rounds: int = 9,
) -> Row:
    """A row of training clips. `open_plain(video)` returns the number of frames and a function that reads frames."""
    labels = FLIP_LABELS if protocol == "something" else {}
    dataset = TrainVideoDataset(
        records=records(kind),
        class_names=None,
        reader=reader,
        protocol=protocol,
        num_segments=SEGMENTS,
        transform=TrainTransform(protocol, SIZE, protocol_resize(protocol, SIZE), labels, rand_aug),
        seed=SEED,
        num_sample=repeats,
    )

    def read(epoch: int, video: int) -> tuple[np.ndarray, list]:
        num_frames, read = open_plain(video)
        indices = sample_train(num_frames, SEGMENTS, protocol, sample_rng(SEED, epoch, video))
        return indices, read(indices)

    def plain(epoch: int, video: int) -> torch.Tensor:
        rngs = [sample_rng(SEED, epoch, video, repeat) for repeat in range(repeats)]
        frames, label = read(epoch, video)[1], dataset.records[video].label
        clips, _ = plain_pipeline.train_clips(frames, label, rngs, protocol, SIZE, labels, rand_aug)
        return clips

    def check(epoch: int, video: int) -> str:
        indices, frames = read(epoch, video)
        with reader.open(dataset.records[video]) as opened:
            assert np.array_equal(dataset.sample(opened.num_frames, epoch, video), indices), "other frame indices"
            distinct, places = dataset.read_distinct(opened, indices)
            for place, frame in zip(places, frames, strict=True):
                assert np.array_equal(distinct[place], frame), "other frames"
        return "same frames"

    return Row(name, goal, plain, lambda epoch, video: dataset[epoch, video]["clips"], check, rounds)


def eval_row(name: str, goal: float | None, kind: str, root: Path, protocol: str, clips: int, crops: int) -> Row:
    """A row of all views of a video."""
    dataset = EvalVideoDataset(
        records=records(kind),
        class_names=None,
        reader=FrameFolderReader(str(root), IMAGE_TMPL),
        protocol=protocol,
        num_segments=SEGMENTS,
        transform=EvalTransform(SIZE, protocol_resize(protocol, SIZE), crops),
        num_clips=clips,
    )

    def plain(_: int, video: int) -> torch.Tensor:
        record = dataset.records[video]
        indices = sample_test(record.num_frames, SEGMENTS, protocol, clips).ravel()
        frames = plain_pipeline.read_folder(str(root / record.path), IMAGE_TMPL, indices)
        return plain_pipeline.eval_views(frames, clips, crops, protocol, SIZE)

    def ours(_: int, video: int) -> torch.Tensor:
        return dataset[video]["clips"]

    def check(epoch: int, video: int) -> str:
        assert torch.equal(normalised(ours(epoch, video)), plain(epoch, video)), "other pixels"
        return "pixels bit-equal"

    return Row(name, goal, plain, ours, check)


def records(kind: str) -> list[VideoRecord]:
    """Records with paths relative to the material and labels 86, 87, ..., which a flip changes."""
    suffix = ".mp4" if kind in VIDEOS else ""
    return [
        VideoRecord(f"{kind}/{video}{suffix}", video_material.FRAMES, 86 + video, kind)
        for video in range(VIDEOS_OF_A_KIND)
    ]


def all_rows(root: Path) -> list[Row]:
    rows = []
    frames = FrameFolderReader(str(root), IMAGE_TMPL)
    for kind in FOLDERS:

        def open_folder(video: int, kind: str = kind) -> tuple[int, Callable]:
            folder = str(root / kind / str(video))
            return video_material.FRAMES, lambda indices: plain_pipeline.read_folder(folder, IMAGE_TMPL, indices)

        rows += [
            train_row(f"train, K400 recipe, {kind}", 2.5, kind, frames, open_folder, "kinetics"),
            train_row(
                f"train, Something recipe, RandAugment, num_sample 2, {kind}",
                4.0, kind, frames, open_folder, "something", rand_aug=True, repeats=2, rounds=25,
            ),
            eval_row(f"validation, kinetics, {kind}", 1.5, kind, root, "kinetics", clips=1, crops=1),
            eval_row(f"validation, something, {kind}", 1.5, kind, root, "something", clips=1, crops=1),
            eval_row(f"test, 3 crops x 4 clips, kinetics, {kind}", 4.0, kind, root, "kinetics", clips=4, crops=3),
            eval_row(f"test, 3 crops x 2 clips, something, {kind}", None, kind, root, "something", clips=2, crops=3),
        ]  # fmt: skip
    for kind, (*_, goal) in VIDEOS.items():

        def open_file(video: int, kind: str = kind) -> tuple[int, Callable]:
            opened = plain_pipeline.open_video(str(root / kind / f"{video}.mp4"))
            return len(opened), lambda indices: plain_pipeline.read_video(opened, indices)

        reader = VideoFileReader(str(root), FIELDS["data.decoder"].default)
        rows.append(train_row(f"train from video files, {kind}", goal, kind, reader, open_file, "kinetics", rounds=5))
    return rows


def compare_packed(root: Path, rounds: int = 600) -> str:
    """Compare opening and reading 8 frames of one video, in a folder and packed; with and without decoding them."""
    readers = [FrameFolderReader(str(root / kind), IMAGE_TMPL) for kind in (LONG_FOLDERS, PACKED)]
    record = VideoRecord("0", PACKED_FRAMES, 0, "benchmark")
    # What is read -> for each round, seconds and seconds of the processor, of the folder and packed.
    spent: dict[str, list[list[tuple[float, float]]]] = {"files": [], "frames": []}
    for round_ in range(rounds + 1):
        indices = sample_train(PACKED_FRAMES, SEGMENTS, "something", np.random.default_rng(round_)).tolist()
        names = [IMAGE_TMPL.format(index + 1) for index in indices]
        for column in spent.values():
            column.append([(0.0, 0.0), (0.0, 0.0)])
        frames: list[list[np.ndarray]] = [[], []]
        for side in (0, 1) if round_ % 2 else (1, 0):  # the first one may find a colder cache
            started = time.perf_counter(), time.process_time()
            with open_frames(f"{readers[side].root}/0") as opened:
                for name in names:
                    opened.read(name)  # as in training, the bytes are dropped when the frame is decoded
            spent["files"][-1][side] = time.perf_counter() - started[0], time.process_time() - started[1]
            started = time.perf_counter(), time.process_time()
            with readers[side].open(record) as video:
                read = video.read(indices)
                spent["frames"][-1][side] = time.perf_counter() - started[0], time.process_time() - started[1]
                frames[side] = [frame.copy() for frame in read]
        assert np.array_equal(*frames), "other frames"
    found = []
    for what, column in spent.items():
        times = np.array(column[1:])  # (rounds, folder and packed, wall and processor)
        folder, packed = np.median(times[..., 0], 0) * 1e3
        ratio, cpu = np.median(times[:, 0] / times[:, 1], 0)
        found.append(
            f"{what}: folder {folder:.3f} ms, packed {packed:.3f} ms, ratio {ratio:.2f} (of processor time {cpu:.2f})"
        )
    return f"{PACKED_ROW}: {'; '.join(found)} (to reach 1.0), {rounds} rounds, same frames"


def compare_segment(root: Path, rounds: int = 9) -> str:
    """Compare a training clip of a segment near the end of a long file with decoding the file from its start."""
    path = str(root / LONG_VIDEO)
    first, count = LONG_FRAMES - 500, 100
    record = VideoRecord(LONG_VIDEO, count, 0, "benchmark", first)
    reader = VideoFileReader(str(root), "pyav")
    started = time.perf_counter()
    reader.open(record)
    scanned = time.perf_counter() - started
    seconds = []
    for round_ in range(rounds):
        indices = sample_train(count, SEGMENTS, "something", np.random.default_rng(round_)).tolist()
        started = time.perf_counter()
        whole = pick(decode_all(path), [first + index for index in indices])
        between = time.perf_counter()
        ours = reader.open(record).read(indices)
        seconds.append((between - started, time.perf_counter() - between))
        assert np.array_equal(whole, ours), "other frames"
    start, near = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(a / b for a, b in seconds)
    return (
        f"{SEGMENT_ROW}: from the start {start * 1e3:.0f} ms, ours {near * 1e3:.1f} ms, ratio {ratio:.0f} (no goal "
        f"set), same frames; the scan, once for each file and process, takes {scanned * 1e3:.0f} ms"
    )


def compare(row: Row) -> list[str]:
    """Return a line with the medians, over rounds, of both times and of their ratio. A round loads every video once."""
    torch.manual_seed(0)
    seconds, clips, sizes, difference = [], 0, (0, 0), []
    for epoch in range(row.rounds + 1):
        spent = [0.0, 0.0]
        clips = 0
        for video in range(VIDEOS_OF_A_KIND):
            results = []
            for side, load in enumerate((row.plain, row.ours)):
                started = time.perf_counter()
                results.append(load(epoch, video))
                spent[side] += time.perf_counter() - started
            clips += len(results[0])
            sizes = tuple(result.untyped_storage().nbytes() // len(result) for result in results)
            difference.append(grey_levels_apart(*results))
            del results
        seconds.append(spent)
    plain, ours = (statistics.median(column) for column in zip(*seconds[1:], strict=True))  # the first warms up
    ratio = statistics.median(a / b for a, b in seconds[1:])
    found = {row.check(0, video) for video in range(VIDEOS_OF_A_KIND)}
    goal = f"to reach {row.goal}" if row.goal else "no goal set"
    return [
        f"{row.name}: plain {clips / plain:.2f} clips/s, ours {clips / ours:.2f} clips/s, ratio {ratio:.2f} "
        f"({goal}), {sizes[0]} and {sizes[1]} bytes a clip (ratio {sizes[0] / sizes[1]:.2f}), "
        f"{', '.join(sorted(found))}, pixels {statistics.mean(difference):.2f} grey levels apart on average"
    ]


def normalised(clips: torch.Tensor) -> torch.Tensor:
    return normalize_clips(clips, plain_pipeline.CLIP_MEAN, plain_pipeline.CLIP_STD)


def grey_levels_apart(plain: torch.Tensor, ours: torch.Tensor) -> float:
    difference = (plain - normalised(ours)) * plain_pipeline.STD * 255
    return difference.abs().mean().item()


def make_material(root: Path) -> None:
    """Generate the missing videos. Each is written to a temporary folder and moved when it is complete."""
    with tempfile.TemporaryDirectory(dir=root) as unfinished:
        for kind, (width, height) in FOLDERS.items():
            for video in range(VIDEOS_OF_A_KIND):
                if not (target := root / kind / str(video)).exists():
                    video_material.write_images(source := Path(unfinished, kind, str(video)), video, width, height)
                    target.parent.mkdir(exist_ok=True)
                    source.rename(target)
        for kind, (width, height, keys, _) in VIDEOS.items():
            for video in range(VIDEOS_OF_A_KIND):
                if not (target := root / kind / f"{video}.mp4").exists():
                    source = Path(unfinished, "video.mp4")
                    video_material.write_video(source, video, width, height, keys)
                    target.parent.mkdir(exist_ok=True)
                    source.rename(target)
        frames = sorted((root / "340x256" / "0").iterdir())
        if not (target := root / LONG_FOLDERS / "0").exists():
            (source := Path(unfinished, "frames")).mkdir()
            for number in range(PACKED_FRAMES):
                shutil.copyfile(frames[number % len(frames)], source / IMAGE_TMPL.format(number + 1))
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
        if not (target := root / PACKED / "0.zip").exists():
            with zipfile.ZipFile(source := Path(unfinished, "0.zip"), "w") as archive:  # as prepare_data.py pack does
                for frame in sorted((root / LONG_FOLDERS / "0").iterdir()):
                    archive.write(frame, frame.name)
            target.parent.mkdir(exist_ok=True)
            source.rename(target)
        if not (root / LONG_VIDEO).exists():
            repeat_video(root / "340x256, key frame every 250" / "0.mp4", Path(unfinished, LONG_VIDEO))
            Path(unfinished, LONG_VIDEO).rename(root / LONG_VIDEO)


def repeat_video(source: Path, target: Path) -> None:
    """Write the packets of a video of FRAMES frames again and again, until there are LONG_FRAMES."""
    with av.open(str(target), "w") as out:
        stream = None
        for turn in range(LONG_FRAMES // video_material.FRAMES):
            with av.open(str(source)) as container:
                stream = stream or out.add_stream_from_template(container.streams.video[0])
                length = container.streams.video[0].duration
                for packet in container.demux(container.streams.video[0]):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = (
                            packet.pts + turn * length,
                            packet.dts + turn * length,
                            stream,
                        )
                        out.mux(packet)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_engine", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--only", metavar="WORDS", default="", help="measure only the rows whose names contain WORDS, and write no file"
    )
    parser.add_argument("--material", type=Path, default=Path(tempfile.gettempdir(), "side4video_material"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    # The folder name contains a hash of the generator, so that a changed generator makes new files.
    root = arguments.material / hashlib.sha256(Path(video_material.__file__).read_bytes()).hexdigest()[:12]
    root.mkdir(parents=True, exist_ok=True)
    make_material(root)
    lines = [
        describe_machine(),
        f"1 process, 1 thread, {VIDEOS_OF_A_KIND} videos of {video_material.FRAMES} frames of each kind, clips of "
        f"{SEGMENTS} frames, {SIZE} pixels",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    for row in all_rows(root):
        if arguments.only in row.name:
            lines += compare(row)
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    for name, compare_row in ((PACKED_ROW, compare_packed), (SEGMENT_ROW, compare_segment)):
        if arguments.only in name:
            lines.append(compare_row(root))
            sys.stdout.write(lines[-1] + "\n")
            sys.stdout.flush()
    if not arguments.only:
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
