"""Measures the video decoders: time per training clip for several kinds of files, and memory over 2,000 clips.

    python -m benchmarks.decoders [--clips N]

Time: median over rounds, in one process with one thread, for clips of 8 frames drawn as in training. In each round,
decord's plain indexing (one frame per index) and each value of `data.decoder` read the same clip in turns.

Memory: resident memory of one process per decoder after a tenth of the clips and after the last one. Every clip opens
its file again, as in training. Writes benchmarks/results/decoders.txt.
"""

import argparse
import hashlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import av
import numpy as np

from benchmarks import plain_pipeline, video_material
from benchmarks.machine import describe_machine
from datasets.annotations import VideoRecord
from datasets.decoders import DECODERS
from datasets.readers import VideoFileReader
from datasets.sampling import kinetics_train

RESULTS = Path("benchmarks/results/decoders.txt")
SEGMENTS, ROUNDS = 8, 9
# File name -> codec, width, height, frames, distance of key frames.
KINDS = {
    "H.264 340x256, key frame every 250.mp4": ("libx264", 340, 256, 250, 250),
    "H.264 340x256, key frame every 12.mp4": ("libx264", 340, 256, 250, 12),
    "H.264 1280x720, key frame every 250.mp4": ("libx264", 1280, 720, 250, 250),
    "VP9 427x240, 48 frames.webm": ("libvpx-vp9", 427, 240, 48, 128),
    "MPEG-4 320x240, 180 frames.avi": ("mpeg4", 320, 240, 180, 12),
    "HEVC 340x256, key frame every 250.mp4": ("libx265", 340, 256, 250, 250),
}
SMALL = [name for name in KINDS if not name.startswith(("H.264 1280x720", "HEVC"))]  # files of the memory measurement


def make_material(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (codec, width, height, frames, keys) in KINDS.items():
        if not (folder / name).exists():
            unfinished = folder / f"unfinished{Path(name).suffix}"
            with av.open(str(unfinished), "w") as container:
                stream = container.add_stream(codec, rate=video_material.RATE, options={"g": str(keys)})
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                for frame in islice(video_material.render(0, width, height), frames):
                    container.mux(stream.encode(av.VideoFrame.from_image(frame)))
                container.mux(stream.encode())
            unfinished.rename(folder / name)


def indices_of(num_frames: int, rng: np.random.Generator) -> list[int]:
    return np.unique(kinetics_train(num_frames, SEGMENTS, rng)).tolist()


def read(folder: Path, name: str, decoder: str, rng: np.random.Generator) -> list[np.ndarray]:
    if decoder == "plain":
        video = plain_pipeline.open_video(str(folder / name))
        return [np.asarray(frame) for frame in plain_pipeline.read_video(video, indices_of(len(video), rng))]
    opened = VideoFileReader(str(folder), decoder).open(VideoRecord(name, None, 0, "benchmark"))
    return opened.read(indices_of(opened.num_frames, rng))


def compare(folder: Path, name: str) -> str:
    """Return a line with the median times. Raises AssertionError if our decoders return different frames."""
    seconds = {"plain": [], **{decoder: [] for decoder in DECODERS}}
    same = True
    for round_ in range(ROUNDS + 1):
        frames = {}
        for decoder, column in seconds.items():
            started = time.perf_counter()
            frames[decoder] = read(folder, name, decoder, np.random.default_rng(round_))
            column.append(time.perf_counter() - started)
        assert same_frames(frames["pyav"], frames["decord"]), f"{name}: other frames"
        same &= same_frames(frames["pyav"], frames["plain"])
    plain = seconds["plain"][1:]  # the first round warms up
    ours = []
    for decoder in DECODERS:
        ratio = statistics.median(a / b for a, b in zip(plain, seconds[decoder][1:], strict=True))
        ours.append(f"{decoder} {statistics.median(seconds[decoder][1:]) * 1e3:.1f} ms (ratio {ratio:.2f})")
    wrong = "" if same else ", with other frames than asked for"
    return f"{name}: plain decord {statistics.median(plain) * 1e3:.1f} ms{wrong}, {', '.join(ours)}"


def same_frames(ours: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Allow two grey levels: MPEG-4's inverse transform is not exact, and versions of FFmpeg differ."""
    return np.shape(ours) == np.shape(others) and np.abs(np.subtract(ours, others, dtype=int)).max() <= 2


def measure_memory(folder: Path, decoder: str, clips: int) -> list[float]:
    """Return the resident memory of this process in MiB after a tenth of the clips and after the last one."""
    rng, found = np.random.default_rng(0), []
    for clip in range(1, clips + 1):
        read(folder, SMALL[clip % len(SMALL)], decoder, rng)
        if clip in (clips // 10, clips):
            with open("/proc/self/statm", encoding="ascii") as file:
                found.append(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoders", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=2000, help="clips over which memory is measured")
    parser.add_argument("--material", type=Path, default=Path(tempfile.gettempdir(), "side4video_material"))
    arguments = parser.parse_args(argv)
    # The folder name contains a hash of the generator, so that a changed generator makes new files.
    sources = Path(video_material.__file__).read_bytes() + repr(KINDS).encode()
    folder = arguments.material / f"decoders-{hashlib.sha256(sources).hexdigest()[:12]}"
    make_material(folder)
    lines = [describe_machine()]
    for name in KINDS:
        lines.append(compare(folder, name))
        sys.stdout.write(lines[-1] + "\n")
    for decoder in DECODERS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            early, late = pool.apply(measure_memory, (folder, decoder, arguments.clips))
        lines.append(
            f"memory with {decoder}: {early:.1f} MiB at clip {arguments.clips // 10}, "
            f"{late:.1f} MiB at clip {arguments.clips}"
        )
        sys.stdout.write(lines[-1] + "\n")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
