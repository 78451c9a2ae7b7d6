"""What to change in a configuration whose training waits for data."""

import math

import numpy as np
from dotmap import DotMap

from datasets.transforms import resize_size
from datasets.video_dataset import VideoDataset
from utils.errors import DataError


def first_frame_size(dataset: VideoDataset) -> tuple[int, int] | None:
    """(width, height) of the first frame of the first video; None if it cannot be read."""
    try:
        (frame,) = dataset.reader.open(dataset.records[0]).read([0])
    except DataError:
        return None
    height, width, _ = np.shape(frame)
    return width, height


def advice(
    config: DotMap, waiting: float, cores: int, processes: int, frame: tuple[int, int] | None = None
) -> list[str]:
    """Lines that say what to change, the most useful first.

    Args:
        config: resolved; its section `data` is read.
        waiting: share of a step's time that is spent waiting for data, below 1.
        cores: CPU cores of the machine.
        processes: training processes that share them.
        frame: width and height of the frames in the data set, if known.
    """
    data = config.data
    lines = [_workers(data, waiting, cores, processes)]
    target = resize_size(*(frame or (1, 1)), data.resize)
    if data.modality == "video":
        lines.append(
            "data.modality=RGB: video files are decoded in every epoch anew, with frames between those that are used; "
            f"tools/prepare_data.py extract writes frames once, best with --short_side {min(target)}"
        )
    elif frame and min(frame) > min(target):
        lines.append(
            f"frames of {frame[0]} x {frame[1]} pixels are decoded only to become {target[0]} x {target[1]}: extract "
            f"them with a shorter side of {min(target)} pixels"
        )
    if data.workers:
        clip = data.num_segments * 3 * data.input_size**2
        megabytes = data.workers * data.prefetch * data.batch_size * data.num_sample * clip / 1e6
        lines.append(
            f"data.prefetch={2 * data.prefetch} instead of {data.prefetch} helps where a few videos take far longer "
            f"than the others, for {math.ceil(megabytes)} MB more in each process"
        )
    if data.rand_aug:
        lines.append("data.rand_aug=False takes work from every clip, but it is another training")
    if data.num_sample == 1 and data.batch_size > 1:
        lines.append(
            f"data.num_sample=2 with data.batch_size={data.batch_size // 2} makes as many clips from half as many "
            "videos, but it is another training"
        )
    return lines


def _workers(data: DotMap, waiting: float, cores: int, processes: int) -> str:
    room = max(1, cores // processes - 1)  # one core is left to the training process
    # The rate of a loader that cannot keep up grows with its workers. With 0 workers, nothing is loaded while the model
    # computes, so the time spent waiting is the time that one worker would need.
    enough = math.ceil(data.workers / (1 - waiting) if data.workers else waiting / (1 - waiting))
    place = f"{cores} CPU cores for {processes} process(es) on this machine"
    if data.workers >= room:
        return (
            f"data.workers is {data.workers}, and {place} leave room for {room}: more workers help only with a slow "
            "disk; otherwise use more cores, or give each worker less to do"
        )
    if enough <= room:
        return f"data.workers={enough} instead of {data.workers} should keep up; {place} leave room for {room}"
    return (
        f"data.workers={room} instead of {data.workers}: as many as {place} leave room for; "
        f"about {enough} would keep up, so give each worker less to do too"
    )
