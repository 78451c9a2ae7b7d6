"""Record -> indices -> frames -> clips, for training (random, repeated) and for evaluation (fixed views).

Every sample is a dict of tensors whose first axis a batch concatenates: R repeats of a training clip, V test views.
Beside them, "unreadable" lists the videos that could not be read: [(index, one line that says why)].
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from datasets.annotations import VideoRecord
from datasets.readers import Reader, Video
from datasets.sampling import sample_test, sample_train
from datasets.transforms import EvalTransform, TrainTransform
from utils.errors import DataError
from utils.seeding import epoch_order, sample_rng


@dataclass(kw_only=True, eq=False)
class VideoDataset(Dataset):
    """What training and evaluation share: the videos, where their frames come from, how a clip is sampled.

    A video that cannot be read raises its DataError, or with `skip_unreadable` does what the class says.
    """

    records: list[VideoRecord]
    class_names: list[str] | None
    reader: Reader
    protocol: str
    num_segments: int
    dense: bool = False
    skip_unreadable: bool = False

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """int64 (videos,), in list order."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    @staticmethod
    def read_distinct(video: Video, indices: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """The frames that `indices` name at least once, and for each index, flattened, its place among them."""
        distinct, places = np.unique(indices, return_inverse=True)
        return video.read(distinct.tolist()), places.ravel()


@dataclass(kw_only=True, eq=False)
class TrainVideoDataset(VideoDataset):
    """`dataset[epoch, index]` -> R = `num_sample` independently augmented clips of the same frames.

    {"clips": uint8 (R, T, 3, S, S), "labels": int64 (R,), "indices": int64 (1,)}, a function of (seed, epoch, index).
    `random_shift=False` takes the frames of validation. The video that is next in the epoch's order stands in for one
    that cannot be read, and so on, from the last on to the first; "indices" names the one that was taken.
    """

    transform: TrainTransform
    seed: int
    random_shift: bool = True
    num_sample: int = 1

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        unreadable: list[tuple[int, str]] = []
        for candidate in self._order_from(epoch, index):
            try:
                return {**self._load(epoch, candidate), "unreadable": unreadable}
            except DataError as error:
                if not self.skip_unreadable:
                    raise
                unreadable.append((candidate, error.line))
        raise DataError(f"none of the {len(self)} training videos can be read; the first: {unreadable[0][1]}")

    def _order_from(self, epoch: int, index: int) -> Iterator[int]:
        yield index
        order = epoch_order(self.seed, epoch, len(self)).tolist()
        place = order.index(index)
        yield from order[place + 1 :] + order[:place]

    def _load(self, epoch: int, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        video = self.reader.open(record)
        distinct, places = self.read_distinct(video, self.sample(video.num_frames, epoch, index))
        frames = [distinct[place] for place in places]
        size = self.transform.input_size
        clips = torch.empty(self.num_sample, self.num_segments, 3, size, size, dtype=torch.uint8)
        labels = [
            self.transform(frames, record.label, sample_rng(self.seed, epoch, index, repeat), clip)
            for repeat, clip in enumerate(clips)
        ]
        return {"clips": clips, "labels": torch.tensor(labels), "indices": torch.tensor([index])}

    def sample(self, num_frames: int, epoch: int, index: int) -> np.ndarray:
        """Frame indices (T,) of one sample."""
        if not self.random_shift:
            return sample_test(num_frames, self.num_segments, self.protocol, dense=self.dense)[0]
        rng = sample_rng(self.seed, epoch, index)
        return sample_train(num_frames, self.num_segments, self.protocol, rng, self.dense)


@dataclass(kw_only=True, eq=False)
class EvalVideoDataset(VideoDataset):
    """`dataset[index]` -> the V = crops x clips views of a video, crop by crop: view = crop * num_clips + clip.

    {"clips": uint8 (V, T, 3, S, S), "labels": int64 (1,), "indices": int64 (1,), "num_frames": int64 (1,)}, the last
    being that of the whole video. A frame that several clips share is decoded and resized once. A video that cannot be
    read gives no views, no label, no index and no number.
    """

    transform: EvalTransform
    num_clips: int = 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            views, num_frames = self._load(self.records[index])
        except DataError as error:
            if not self.skip_unreadable:
                raise
            size, nothing = self.transform.input_size, torch.empty(0, dtype=torch.int64)
            views = torch.empty(0, self.num_segments, 3, size, size, dtype=torch.uint8)
            numbers = dict.fromkeys(("labels", "indices", "num_frames"), nothing)
            return {"clips": views, **numbers, "unreadable": [(index, error.line)]}
        facts = {"labels": self.records[index].label, "indices": index, "num_frames": num_frames}
        return {"clips": views, **{name: torch.tensor([n]) for name, n in facts.items()}, "unreadable": []}

    def _load(self, record: VideoRecord) -> tuple[torch.Tensor, int]:
        """uint8 (V, T, 3, S, S), and the number of frames of the video."""
        video = self.reader.open(record)
        indices = sample_test(video.num_frames, self.num_segments, self.protocol, self.num_clips, self.dense)
        frames, places = self.read_distinct(video, indices)
        crops = self.transform(frames, places)  # (crops, clips * T, 3, S, S)
        return crops.unflatten(1, indices.shape).flatten(0, 1), video.num_frames
