"""Data sets of clips: record -> indices -> frames -> clips, random for training and fixed for evaluation.

A sample is a dict of tensors that a batch concatenates along the first axis. Two keys hold lists instead, of (index,
message of one line): "unreadable" the videos that could not be read, "damaged" those of which something could not be
decoded, and the rest is used.

Letters: R repeats of a training clip, V views of a test video, T frames of a clip, H, W pixels (both `input_size`).
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.annotations import VideoRecord
from datasets.decoders import FrameCountError
from datasets.readers import OpenedVideo, Reader
from datasets.sampling import sample_test, sample_train
from datasets.transforms import EvalTransform, TrainTransform
from utils.errors import DataError
from utils.seeding import balanced_order, epoch_order, sample_rng


@dataclass(kw_only=True, eq=False)
class VideoDataset(Dataset):
    """Base class of the training and evaluation data sets.

    A video that cannot be read raises its DataError, unless `skip_unreadable` is set. The subclasses say how they skip.
    """

    records: list[VideoRecord]
    class_names: list[str] | None
    reader: Reader
    protocol: str
    num_segments: int
    dense: bool = False
    skip_unreadable: bool = False
    refuse_damaged: bool = False  # as videos that cannot be read

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """Labels of all videos, int64 (videos,), in list order."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    @staticmethod
    def read_distinct(video: OpenedVideo, indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Read each frame of `indices` once.

        Returns:
            frames: the distinct frames in ascending order.
            places: int64, one for each element of the flattened `indices`: the place of its frame in `frames`.
        """
        distinct, places = np.unique(indices, return_inverse=True)
        return video.read(distinct.tolist()), places.ravel()

    def read_chosen(
        self, video: OpenedVideo, choose: Callable[[int], np.ndarray]
    ) -> tuple[int, np.ndarray, list[np.ndarray], np.ndarray]:
        """Read the frames that `choose(num_frames)` names.

        Returns:
            number of frames, indices, and the two results of `read_distinct`.

        Raises:
            DataError: the video cannot be read, or is damaged and `refuse_damaged` is set.
        """
        num_frames = video.num_frames
        while True:
            indices = choose(num_frames)
            try:
                frames, places = self.read_distinct(video, indices)
                break
            except FrameCountError as error:  # it shows only when packets are decoded, and leaves fewer frames
                num_frames = error.num_frames
        if self.refuse_damaged and (damage := video.damage()):
            raise DataError(f"{damage}; data.on_damage=accept uses what can be decoded")
        return num_frames, indices, frames, places


@dataclass(kw_only=True, eq=False)
class TrainVideoDataset(VideoDataset):
    """Training samples: `dataset[epoch, index]` has R = `num_sample` clips of the same frames, augmented independently.

    A sample is {"clips": uint8 (R, T, 3, H, W), "labels": int64 (R,), "indices": int64 (1,)} and depends only on
    (seed, epoch, index). With `random_shift=False` the frames are those of validation.

    With `balance`, an epoch has each class equally often and may have a video several times (see `balanced_order`).
    The key is then (epoch, index, place), and the sample depends on the place in the epoch's order too.

    With `skip_unreadable`, a video that cannot be read is replaced by the next readable one in the order of the epoch,
    which continues with the first video after the last. With `balance`, videos of the same class are tried first.
    "indices" holds the index of the replacement.
    """

    transform: TrainTransform
    seed: int
    random_shift: bool = True
    num_sample: int = 1
    balance: bool = False

    def __getitem__(self, key: tuple[int, int] | tuple[int, int, int]) -> dict[str, Any]:
        epoch, index, *rest = key
        place = rest[0] if rest else None
        unreadable: list[tuple[int, str]] = []
        for candidate in self._order_from(epoch, index, place):
            try:
                clips, labels, damage = self._load(epoch, candidate, place)
            except DataError as error:
                if not self.skip_unreadable:
                    raise
                unreadable.append((candidate, error.line))
                continue
            tensors = {"clips": clips, "labels": labels, "indices": torch.tensor([candidate])}
            return {**tensors, "unreadable": unreadable, "damaged": [(candidate, damage)] if damage else []}
        raise DataError(f"none of the {len(self)} training videos can be read; the first: {unreadable[0][1]}")

    def order(self, epoch: int) -> np.ndarray:
        """Return the indices in the order of one epoch, int64 (videos,), the same on every process."""
        if self.balance:
            return balanced_order(self.seed, epoch, self.labels)
        return epoch_order(self.seed, epoch, len(self))

    def _order_from(self, epoch: int, index: int, place: int | None) -> Iterator[int]:
        """Yield `index`, then the indices that replace it, in the order in which they are tried."""
        yield index
        order = self.order(epoch).tolist()
        place = order.index(index) if place is None else place
        following = order[place + 1 :] + order[:place]
        if self.balance:  # each video once, also those that this epoch has not
            label = self.records[index].label
            others = [other for other in dict.fromkeys([*following, *range(len(self))]) if other != index]
            following = sorted(others, key=lambda other: self.records[other].label != label)
        yield from following

    def _load(self, epoch: int, index: int, place: int | None) -> tuple[torch.Tensor, torch.Tensor, str | None]:
        """Return clips, uint8 (R, T, 3, H, W), labels, int64 (R,), and the video's damage."""
        record = self.records[index]
        size = self.transform.input_size
        clips = torch.empty(self.num_sample, self.num_segments, 3, size, size, dtype=torch.uint8)
        with self.reader.open(record) as video:
            choose = functools.partial(self.sample, epoch=epoch, index=index, place=place)
            _, _, distinct, places = self.read_chosen(video, choose)
            damage = video.damage()
            frames = [distinct[place] for place in places]
            labels = [
                self.transform(frames, record.label, sample_rng(self.seed, epoch, index, repeat, place), clip)
                for repeat, clip in enumerate(clips)
            ]
        return clips, torch.tensor(labels), damage

    def sample(self, num_frames: int, epoch: int, index: int, place: int | None = None) -> np.ndarray:
        """Return the frame indices of one sample, int64 (T,)."""
        if not self.random_shift:
            return sample_test(num_frames, self.num_segments, self.protocol, dense=self.dense)[0]
        rng = sample_rng(self.seed, epoch, index, place=place)
        return sample_train(num_frames, self.num_segments, self.protocol, rng, self.dense)


@dataclass(kw_only=True, eq=False)
class EvalVideoDataset(VideoDataset):
    """Evaluation samples: `dataset[index]` has the V = crops * clips views of a video; view = crop * num_clips + clip.

    A sample is {"clips": uint8 (V, T, 3, H, W), "labels": int64 (1,), "indices": int64 (1,), "num_frames": int64 (1,)};
    the last is that of the whole video. A frame that several clips share is decoded and resized once.

    With `skip_unreadable`, a video that cannot be read gives a sample with 0 views, and nothing in the others.
    """

    transform: EvalTransform
    num_clips: int = 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            views, num_frames, damage = self._load(self.records[index])
        except DataError as error:
            if not self.skip_unreadable:
                raise
            size, nothing = self.transform.input_size, torch.empty(0, dtype=torch.int64)
            views = torch.empty(0, self.num_segments, 3, size, size, dtype=torch.uint8)
            numbers = dict.fromkeys(("labels", "indices", "num_frames"), nothing)
            return {"clips": views, **numbers, "unreadable": [(index, error.line)], "damaged": []}
        facts = {"labels": self.records[index].label, "indices": index, "num_frames": num_frames}
        numbers = {name: torch.tensor([n]) for name, n in facts.items()}
        return {"clips": views, **numbers, "unreadable": [], "damaged": [(index, damage)] if damage else []}

    def _load(self, record: VideoRecord) -> tuple[torch.Tensor, int, str | None]:
        """Return the views of a video, uint8 (V, T, 3, H, W), its number of frames and its damage."""

        def choose(num_frames: int) -> np.ndarray:
            return sample_test(num_frames, self.num_segments, self.protocol, self.num_clips, self.dense)

        with self.reader.open(record) as video:
            num_frames, indices, frames, places = self.read_chosen(video, choose)
            damage = video.damage()
            crops = self.transform(frames, places)  # (crops, clips * T, 3, H, W)
        return crops.unflatten(1, indices.shape).flatten(0, 1), num_frames, damage
