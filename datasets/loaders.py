"""Config -> DataLoader: which process sees which video when, and how samples become batches."""

from collections.abc import Iterator, Sized
from typing import Any

import torch
from dotmap import DotMap
from torch.utils.data import DataLoader, Sampler

from datasets.annotations import VideoRecord, few_shot, read_annotations, read_class_names
from datasets.flips import flip_pairs
from datasets.readers import FrameFolderReader, Reader, VideoFileReader
from datasets.transforms import EvalTransform, TrainTransform
from datasets.video_dataset import EvalVideoDataset, TrainVideoDataset, VideoDataset
from utils.errors import DataError
from utils.seeding import epoch_order, shot_rng


class VideoLoader(DataLoader):
    """Batches of tensors; `unreadable` lists the videos that this pass could not read: [(index, why in one line)]."""

    unreadable: list[tuple[int, str]]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.unreadable = []
        for batch in super().__iter__():
            self.unreadable += batch.pop("unreadable")
            yield batch


def build_train_loader(config: DotMap, rank: int = 0, world_size: int = 1) -> VideoLoader:
    """Batches of `data.batch_size` videos in this process's share of an order that changes with the epoch.

    A batch is {"clips": uint8 (B, T, 3, H, W), "labels": int64 (B,), "indices": int64 (batch_size,)} with
    B = batch_size * num_sample, repeats of a video side by side (a a b b). Call `loader.sampler.set_epoch(epoch)`
    before each epoch. `len(loader)` is a multiple of `solver.grad_accumulation_steps`: what is left of the order is
    not used in that epoch. `data.on_error: skip` replaces videos that cannot be read. Raises DataError when the videos
    do not fill one step.
    """
    data = config.data
    common = _common_parts(config, data.train_root, data.train_list)
    labels = flip_pairs(data.protocol, data.num_classes, common["class_names"]) if data.flip else None
    if data.shot:
        names = common["class_names"] or [f"class {label}" for label in range(data.num_classes)]
        common["records"] = few_shot(common["records"], data.shot, names, shot_rng(config.seed))
    dataset = TrainVideoDataset(
        **common,
        skip_unreadable=data.on_error == "skip",
        transform=TrainTransform(data.protocol, data.input_size, data.resize, labels, data.rand_aug),
        dense=data.dense,
        seed=config.seed,
        random_shift=data.random_shift,
        num_sample=data.num_sample,
    )
    accumulation = config.solver.grad_accumulation_steps
    steps = len(dataset) // (data.batch_size * world_size * accumulation)
    if steps == 0:
        raise DataError(
            f"{data.train_list}: {len(dataset)} videos do not fill one step of data.batch_size {data.batch_size} x "
            f"{world_size} processes x solver.grad_accumulation_steps {accumulation}; lower data.batch_size"
        )
    sampler = EpochSampler(len(dataset), steps * accumulation * data.batch_size, config.seed, rank, world_size)
    return _loader(config, dataset, sampler, data.batch_size)


def build_eval_loader(
    config: DotMap,
    rank: int = 0,
    world_size: int = 1,
    clips: int = 1,
    crops: int = 1,
    dense: bool | None = None,
    unlabelled: bool = False,
) -> VideoLoader:
    """Every video of `data.val_list` once over all processes, in list order, with V = crops x clips views.

    `unlabelled` accepts a list in which every label is -1. Batches and the other arguments are those of
    `build_record_loader`.

    A video file that cannot be read is left out of its batch and listed in `loader.unreadable`; a frame folder only
    with `data.on_error: skip`, else its DataError stops the run.
    """
    data = config.data
    common = _common_parts(config, data.val_root, data.val_list, unlabelled)
    return build_record_loader(
        config,
        common["records"],
        common["reader"],
        rank,
        world_size,
        clips,
        crops,
        dense,
        class_names=common["class_names"],
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
    skip_unreadable: bool = True,
) -> VideoLoader:
    """Every record once over all processes, in order, with V = crops x clips views.

    A batch is {"clips": uint8 (videos * V, T, 3, H, W), "labels": int64 (videos,), "indices": int64 (videos,),
    "num_frames": int64 (videos,)}, the views of a video side by side. Batches hold as many whole videos as fit
    `test.view_batch` views, at least one. `dense=None` takes `data.dense`.

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
        transform=EvalTransform(data.input_size, data.resize, crops),
        dense=data.dense if dense is None else dense,
        num_clips=clips,
    )
    videos = max(1, config.test.view_batch // (clips * crops))
    return _loader(config, dataset, range(rank, len(dataset), world_size), videos)


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) keys: this process's share of a permutation that (seed, epoch) alone determine.

    The epoch travels with the index, so that workers which outlive an epoch need not be told.
    """

    def __init__(self, num_videos: int, share: int, seed: int, rank: int, world_size: int):
        self.num_videos = num_videos
        self.share = share
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.share

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = epoch_order(self.seed, self.epoch, self.num_videos)
        for index in order[self.rank :: self.world_size][: self.share].tolist():
            yield self.epoch, index


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Fold repeats and views into the batch axis; the lists of unreadable videos become one."""
    unreadable = [video for sample in samples for video in sample.pop("unreadable")]
    return {**{name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}, "unreadable": unreadable}


def _common_parts(config: DotMap, root: str, list_path: str, unlabelled: bool = False) -> dict[str, Any]:
    data = config.data
    return {
        "records": read_annotations(list_path, data.num_classes, data.modality, unlabelled),
        "class_names": read_class_names(data.label_list, data.num_classes) if data.label_list else None,
        "reader": _reader(data, root),
        "protocol": data.protocol,
        "num_segments": data.num_segments,
    }


def _reader(data: DotMap, root: str) -> Reader:
    if data.modality == "video":
        return VideoFileReader(root, data.decoder)
    return FrameFolderReader(root, data.image_tmpl, data.count_frames, data.index_base)


def _loader(config: DotMap, dataset: VideoDataset, sampler: Sized, batch_size: int) -> VideoLoader:
    workers = config.data.workers
    return VideoLoader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=config.data.prefetch if workers > 0 else None,
        # The loader draws a seed for its workers, which nothing uses: not from the generator that dropout draws from.
        generator=torch.Generator(),
    )
