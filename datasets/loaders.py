"""Builds the data loaders of a configuration: the order of videos, their share per process, and batches.

B clips (repeats and views counted), T frames of a clip, H, W pixels, V views of a test video.
"""

import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from dotmap import DotMap
from torch.utils.data import DataLoader, Sampler

from datasets.annotations import VideoRecord, few_shot, read_annotations, read_class_names
from datasets.flips import flip_pairs
from datasets.readers import FrameFolderReader, Reader, VideoFileReader
from datasets.transforms import EvalTransform, TrainTransform
from datasets.video_dataset import EvalVideoDataset, TrainVideoDataset, VideoDataset
from utils.distributed import device_type
from utils.errors import ConfigError, DataError, UserError
from utils.parallel import usable_cores
from utils.seeding import shot_rng
from utils.signals import ignoring_ended_children

MOST_NAMED = 100  # classes in one line of the log

log = logging.getLogger(__name__)


class WorkerLostError(UserError):
    """A loader process has ended, or does not answer."""


class VideoLoader(DataLoader):
    """Yields batches of tensors.

    `unreadable` lists the videos that could not be read since the last start of an iteration, each as
    (index, message of one line), and `damaged` those of which something could not be decoded. `carried` is what both
    start with in the next iteration: a resumed epoch puts the videos there that were met before it was interrupted.
    """

    dataset: VideoDataset
    unreadable: list[tuple[int, str]]
    damaged: list[tuple[int, str]]
    carried: dict[str, list[tuple[int, str]]] = {}
    stall_seconds: float  # after so long without a batch, the workers are killed and `stalled` is True
    stalled = False
    _arrived = 0  # batches of this iteration
    _processes: Sequence[BaseProcess] = ()
    clip_bytes: int  # of all clips, or views, of one video

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:  # type: ignore[override]  # torch says: a private class
        self.unreadable, self.damaged = (list(self.carried.get(name, [])) for name in ("unreadable", "damaged"))
        self.carried = {}
        return self._batches()

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        self._arrived = 0
        batches = super().__iter__()
        while (batch := self._next(batches)) is not None:
            self._arrived += 1
            self.unreadable += batch.pop("unreadable")
            self.damaged += batch.pop("damaged")
            yield batch

    def _next(self, batches: Any) -> dict[str, Any] | None:
        """The next batch, or None after the last. Ends the workers if it does not arrive in `stall_seconds`.

        DataLoader's own timeout does not reach the socket through which a worker hands over the file descriptor of a
        tensor. When the workers are dead, all waits for them end with an error.
        """
        if not self.num_workers:
            return next(batches, None)
        self._processes = batches._workers
        timer = threading.Timer(self.stall_seconds, self._stall)
        timer.daemon = True
        timer.start()
        try:
            return next(batches, None)
        finally:
            timer.cancel()

    def _stall(self) -> None:
        self.stalled = True
        for process in self._processes:
            process.kill()

    def end_workers(self) -> None:
        """Kill the loader processes and wait for their end, at most 2 s."""
        end = time.monotonic() + 2
        with ignoring_ended_children():
            for process in self._processes:
                process.kill()
            for process in self._processes:
                process.join(max(0.0, end - time.monotonic()))

    def met(self) -> dict[str, list[tuple[int, str]]]:
        """What `carried` takes."""
        return {"unreadable": self.unreadable, "damaged": self.damaged}

    def held_videos(self) -> list[str]:
        """Names of the videos whose batches the workers are preparing, those of the next batch first."""
        batches = itertools.islice(self.batch_sampler or (), self._arrived, self._arrived + self.num_workers)
        indices = [key[1] if isinstance(key, tuple) else key for keys in batches for key in keys]
        return [self.dataset.records[index].name for index in indices]


@contextmanager
def naming_lost_workers(loader: VideoLoader) -> Iterator[None]:
    """Turn torch's error about a loader process that has ended, or does not answer, into a WorkerLostError.

    torch raises a plain RuntimeError, and may do so anywhere: a signal handler of it notices that the process is gone.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        if not loader.stalled and (
            (isinstance(error, RuntimeError) and "DataLoader" not in str(error))
            or (isinstance(error, OSError) and not isinstance(error, ConnectionError))
        ):
            raise
        if loader.stalled or "timed out" in str(error):
            what = (
                f"no loader process gave a batch for {loader.stall_seconds:.0f} s; a disk that does not answer is the "
                "usual"
            )
        else:
            what = "a loader process was ended; not enough memory (lower data.workers or data.prefetch) is the usual"
        loader.end_workers()  # else torch reports their end as another error, wherever this process is then
        held = loader.held_videos()
        shown = ", ".join(held[:4]) + (", ..." if len(held) > 4 else "")
        detail = " ".join(str(error).split())
        raise WorkerLostError(f"{what} cause; the loader processes held the videos {shown} ({detail})") from error


def check_shared_memory(*loaders: VideoLoader) -> None:
    """Refuse loaders whose batches do not fit into the shared memory, which would hang for ever.

    The workers of all loaders stay alive, and each keeps `prefetch_factor` batches there.

    Raises:
        ConfigError: they do not fit.
    """
    try:
        system = os.statvfs("/dev/shm")
    except OSError:  # no Linux, or no such folder: torch shares memory in another way
        return
    free = system.f_bavail * system.f_frsize
    needed = 0
    for loader in loaders:
        if loader.num_workers:
            clip_bytes = loader.clip_bytes * (loader.batch_size or 1)
            needed += clip_bytes * (loader.num_workers * (loader.prefetch_factor or 1) + 1)
    if needed > free:
        workers, prefetch = loaders[0].num_workers, loaders[0].prefetch_factor
        raise ConfigError(
            f"data.workers: {workers} workers keep {prefetch} batches each in shared memory, {needed / 1e6:.1f} MB for "
            f"training and evaluation, but /dev/shm has {free / 1e6:.1f} MB free; lower data.workers or data.prefetch, "
            "or give the container more (docker run --shm-size=8g, or --ipc=host)"
        )


def leave_process_group(worker: int) -> None:
    """In a loader process: launchers and terminals signal whole groups, but the training process ends its workers."""
    os.setpgid(0, 0)


def build_train_loader(config: DotMap, rank: int = 0, world_size: int = 1) -> VideoLoader:
    """Return a loader of this process's share of the training videos, in an order that changes with the epoch.

    A batch is {"clips": uint8 (B, T, 3, H, W), "labels": int64 (B,), "indices": int64 (batch_size,)} with
    B = batch_size * num_sample; the repeats of a video are next to each other (a a b b). Call
    `loader.sampler.set_epoch(epoch)` before each epoch. `len(loader)` is a multiple of
    `solver.grad_accumulation_steps`; videos that do not fill another step are left out of the epoch. With
    `data.on_error: skip`, videos that cannot be read are replaced.

    Args:
        config: a resolved configuration.

    Raises:
        DataError: the lists cannot be used, or the videos do not fill one step.
        ConfigError: the flip pairs are not known (see `flip_pairs`).
    """
    data = config.data
    common = _common_parts(config, data.train_root, data.train_list)
    labels = flip_pairs(data.protocol, data.num_classes, common["class_names"]) if data.flip else None
    names = common["class_names"] or [f"class {label}" for label in range(data.num_classes)]
    common["records"] = long_enough(
        common["records"], data.min_frames, data.train_list, common["reader"], data.count_frames
    )
    name_absent_classes(common["records"], names, data.train_list)
    if data.shot:
        common["records"] = few_shot(common["records"], data.shot, names, shot_rng(config.seed))
    dataset = TrainVideoDataset(
        **common,
        skip_unreadable=data.on_error == "skip",
        refuse_damaged=data.on_damage == "error",
        transform=TrainTransform(data.protocol, data.input_size, data.resize, labels, data.rand_aug),
        dense=data.dense,
        seed=config.seed,
        random_shift=data.random_shift,
        num_sample=data.num_sample,
        balance=data.balance,
    )
    accumulation = config.solver.grad_accumulation_steps
    steps = len(dataset) // (data.batch_size * world_size * accumulation)
    if steps == 0:
        raise DataError(
            f"{data.train_list}: {len(dataset)} videos do not fill one step of data.batch_size {data.batch_size} x "
            f"{world_size} processes x solver.grad_accumulation_steps {accumulation}; lower data.batch_size"
        )
    sampler = EpochSampler(dataset.order, steps * accumulation * data.batch_size, rank, world_size, data.balance)
    return _loader(config, dataset, sampler, data.batch_size, data.num_sample)


def build_eval_loader(
    config: DotMap,
    rank: int = 0,
    world_size: int = 1,
    clips: int = 1,
    crops: int = 1,
    dense: bool | None = None,
    unlabelled: bool = False,
    done: Collection[int] = (),
    every_video: bool = False,
) -> VideoLoader:
    """Return a loader of this process's share of `data.val_list`, in list order, with V = crops * clips views each.

    Over all processes, every video is loaded once. A batch is {"clips": uint8 (videos * V, T, 3, H, W), "labels": int64
    (videos,), "indices": int64 (videos,), "num_frames": int64 (videos,)}; the views of a video are next to each other.
    A batch has as many videos as fit into `test.view_batch` views, at least one.

    A video file that cannot be read is left out of its batch and listed in `loader.unreadable`. A frame folder that
    cannot be read raises its DataError, unless `data.on_error` is `skip`.

    Args:
        config: a resolved configuration.
        dense: whether sampling is dense; None takes `data.dense`.
        unlabelled: accept a list in which every label is -1.
        done: indices of videos that are left out.
        every_video: a test takes every video of the list; validation leaves out those below `data.min_frames`.

    Raises:
        DataError: the lists cannot be used.
    """
    data = config.data
    common = _common_parts(config, data.val_root, data.val_list, unlabelled)
    least = 1 if every_video else data.min_frames
    return build_record_loader(
        config,
        long_enough(common["records"], least, data.val_list, common["reader"], data.count_frames),
        common["reader"],
        rank,
        world_size,
        clips,
        crops,
        dense,
        class_names=common["class_names"],
        done=done,
        skip_unreadable=data.modality == "video" or data.on_error == "skip",
    )


def build_record_loader(
    config: DotMap,
    records: list[VideoRecord],
    reader: Reader,
    rank: int = 0,
    world_size: int = 1,
    clips: int = 1,
    crops: int = 1,
    dense: bool | None = None,
    *,
    class_names: list[str] | None = None,
    done: Collection[int] = (),
    skip_unreadable: bool = True,
) -> VideoLoader:
    """Return a loader of this process's share of records, in their order, with V = crops * clips views each.

    Batches and arguments are those of `build_eval_loader`.

    With `skip_unreadable`, a video that cannot be read is left out of its batch and listed in `loader.unreadable`.
    """
    data = config.data
    dataset = EvalVideoDataset(
        records=records,
        class_names=class_names,
        reader=reader,
        protocol=data.protocol,
        num_segments=data.num_segments,
        skip_unreadable=skip_unreadable,
        refuse_damaged=data.on_damage == "error",
        transform=EvalTransform(data.input_size, data.resize, crops),
        dense=data.dense if dense is None else dense,
        num_clips=clips,
    )
    videos = max(1, config.test.view_batch // (clips * crops))
    own = [index for index in range(rank, len(dataset), world_size) if index not in done]
    return _loader(config, dataset, own, videos, clips * crops)


def long_enough(
    records: list[VideoRecord], min_frames: int, list_path: str, reader: Reader, count_frames: bool
) -> list[VideoRecord]:
    """Return the records of at least `min_frames` frames, in their order, and log how many are left out.

    The number of frames is the one that clips are drawn from: that of the list or, with `count_frames` and for video
    files, that of the reader, for which every video is opened once. A video that cannot be opened stays, so that it is
    reported where it is read.

    Raises:
        DataError: no video is long enough.
    """
    if min_frames <= 1:
        return records

    def is_long_enough(record: VideoRecord) -> bool:
        if record.num_frames is not None and not count_frames:
            return record.num_frames >= min_frames
        try:
            with reader.open(record) as video:
                return video.num_frames >= min_frames
        except DataError:
            return True

    with ThreadPoolExecutor(usable_cores()) as pool:
        every = pool.map if count_frames or records[0].num_frames is None else map
        kept = [record for record, keep in zip(records, every(is_long_enough, records), strict=True) if keep]
    if not kept:
        raise DataError(f"{list_path}: none of its {len(records)} videos has data.min_frames {min_frames}; lower it")
    if left_out := len(records) - len(kept):
        of = f"{left_out} of {len(records)} videos"
        log.info("%s: %s left out, which have fewer frames than data.min_frames %d", list_path, of, min_frames)
    return kept


def name_absent_classes(records: list[VideoRecord], names: list[str], list_path: str) -> None:
    """Log a warning that names the classes without a video."""
    present = {record.label for record in records}
    if absent := [name for label, name in enumerate(names) if label not in present]:
        more = f", and {len(absent) - MOST_NAMED} more" if len(absent) > MOST_NAMED else ""
        shown = ", ".join(absent[:MOST_NAMED]) + more
        log.warning("%s: %d of %d classes have no training video: %s", list_path, len(absent), len(names), shown)


class EpochSampler(Sampler[tuple[int, ...]]):
    """Yields (epoch, index) for `share` videos of this process, in an order that depends on the epoch only.

    The key contains the epoch because persistent workers keep their copy of the data set from epoch to epoch. With
    `places`, it also contains the place in the order: (epoch, index, place).

    Args:
        order: maps an epoch to the indices of its videos, int64 (videos,), the same on every process.
    """

    def __init__(
        self, order: Callable[[int], np.ndarray], share: int, rank: int, world_size: int, places: bool = False
    ):
        self.order = order
        self.share = share
        self.rank = rank
        self.world_size = world_size
        self.places = places
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is that of this epoch, without the first `start` videos of this process's share."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = self.order(self.epoch).tolist()
        for place in range(self.rank, len(order), self.world_size)[self.start : self.share]:
            yield (self.epoch, order[place], place) if self.places else (self.epoch, order[place])


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate the tensors of samples along the first axis, and their lists."""
    batch: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = [video for value in values for video in value] if isinstance(first, list) else torch.cat(values)
    return batch


def _common_parts(config: DotMap, root: str, list_path: str, unlabelled: bool = False) -> dict[str, Any]:
    data = config.data
    return {
        "records": read_annotations(list_path, data.num_classes, data.modality, unlabelled, data.segments),
        "class_names": read_class_names(data.label_list, data.num_classes) if data.label_list else None,
        "reader": _reader(data, root),
        "protocol": data.protocol,
        "num_segments": data.num_segments,
    }


def _reader(data: DotMap, root: str) -> Reader:
    if data.modality == "video":
        return VideoFileReader(root, data.decoder)
    return FrameFolderReader(root, data.image_tmpl, data.count_frames, data.index_base)


def _loader(
    config: DotMap, dataset: VideoDataset, sampler: EpochSampler | Sequence[int], batch_size: int, clips: int
) -> VideoLoader:
    """The loader of a data set whose videos give `clips` clips each."""
    workers = config.data.workers
    loader = VideoLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=device_type() == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=config.data.prefetch if workers > 0 else None,
        # A DataLoader draws a seed for its workers. Nothing uses it, so it must not advance the global generator, from
        # which dropout draws.
        generator=torch.Generator(),
        worker_init_fn=leave_process_group,
        timeout=60 * config.solver.timeout_minutes if workers > 0 else 0,
    )
    loader.stall_seconds = 60 * config.solver.timeout_minutes
    loader.clip_bytes = clips * dataset.num_segments * 3 * config.data.input_size**2
    return loader
