"""Memory of a process that reads clips from video files with one decoder after another, at clip 200 and clip 2000.

    python -m benchmarks.decoder_memory [--clips N]

Each decoder has a process of its own and opens every video anew for each clip, as training does: H.264 in mp4, VP9 in
webm and MPEG-4 in avi by turns, 8 frames of 60. Writes benchmarks/results/decoder_memory.txt.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
from itertools import islice
from pathlib import Path

import av
import numpy as np

from benchmarks import video_material
from benchmarks.machine import describe_machine
from datasets.annotations import VideoRecord
from datasets.decoders import DECODERS
from datasets.readers import VideoFileReader
from datasets.sampling import kinetics_train

RESULTS = Path("benchmarks/results/decoder_memory.txt")
FRAMES, WIDTH, HEIGHT, SEGMENTS = 60, 340, 256, 8
KINDS = {"h264.mp4": "libx264", "vp9.webm": "libvpx-vp9", "mpeg4.avi": "mpeg4"}


def write(folder: Path) -> None:
    frames = list(islice(video_material.render(0, WIDTH, HEIGHT), FRAMES))
    for name, codec in KINDS.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())


def resident() -> float:
    """MiB of memory that this process holds."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(folder: str, decoder: str, clips: int) -> list[float]:
    """MiB at a tenth of the clips and at the last one."""
    reader, rng, found = VideoFileReader(folder, decoder), np.random.default_rng(0), []
    for clip in range(1, clips + 1):
        video = reader.open(VideoRecord(list(KINDS)[clip % len(KINDS)], None, 0, "benchmark"))
        video.read(np.unique(kinetics_train(video.num_frames, SEGMENTS, rng)).tolist())
        if clip in (clips // 10, clips):
            found.append(resident())
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder_memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=2000)
    clips = parser.parse_args(argv).clips
    lines = [describe_machine()]
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for decoder in DECODERS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                early, late = pool.apply(measure, (folder, decoder, clips))
            lines.append(f"{decoder}: {early:.1f} MiB at clip {clips // 10}, {late:.1f} MiB at clip {clips}")
            sys.stdout.write(lines[-1] + "\n")
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
