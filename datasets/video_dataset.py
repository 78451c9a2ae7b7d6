"""Record -> indices -> frames -> clips, for training (random, repeated) and for evaluation (fixed views).

Every sample is a dict of tensors whose first axis a batch concatenates: R repeats of a training clip, V test views.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL.Image import Image
from torch.utils.data import Dataset

from datasets.annotations import VideoRecord
from datasets.readers import FrameFolderReader
from datasets.sampling import sample_test, sample_train
from datasets.transforms import EvalTransform, TrainTransform
from utils.seeding import sample_rng


@dataclass(kw_only=True, eq=False)
class VideoDataset(Dataset):
    """What training and evaluation share: the videos, where their frames come from, how a clip is sampled."""

    records: list[VideoRecord]
    class_names: list[str] | None
    reader: FrameFolderReader
    protocol: str
    num_segments: int
    dense: bool = False

    def __len__(self) -> int:
        return len(self.records)

    @property
    def labels(self) -> np.ndarray:
        """int64 (videos,), in list order."""
        return np.array([record.label for record in self.records], dtype=np.int64)

    def read_distinct(self, record: VideoRecord, indices: np.ndarray) -> tuple[list[Image], np.ndarray]:
        """The frames that `indices` name at least once, and for each index, flattened, its place among them."""
        distinct, places = np.unique(indices, return_inverse=True)
        return self.reader.read(record, distinct.tolist()), places.ravel()


@dataclass(kw_only=True, eq=False)
class TrainVideoDataset(VideoDataset):
    """`dataset[epoch, index]` -> R = `num_sample` independently augmented clips of the same frames.

    {"clips": uint8 (R, T, 3, S, S), "labels": int64 (R,), "indices": int64 (1,)}, a function of (seed, epoch, index).
    `random_shift=False` takes the frames of validation.
    """

    transform: TrainTransform
    seed: int
    random_shift: bool = True
    num_sample: int = 1

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        record = self.records[index]
        distinct, places = self.read_distinct(record, self.sample(record, epoch, index))
        frames = [distinct[place] for place in places]
        rngs = [sample_rng(self.seed, epoch, index, repeat) for repeat in range(self.num_sample)]
        clips, labels = zip(*(self.transform(frames, record.label, rng) for rng in rngs), strict=True)
        return {"clips": torch.stack(clips), "labels": torch.tensor(labels), "indices": torch.tensor([index])}

    def sample(self, record: VideoRecord, epoch: int, index: int) -> np.ndarray:
        """Frame indices (T,) of one sample."""
        num_frames = self.reader.num_frames(record)
        if not self.random_shift:
            return sample_test(num_frames, self.num_segments, self.protocol, dense=self.dense)[0]
        rng = sample_rng(self.seed, epoch, index)
        return sample_train(num_frames, self.num_segments, self.protocol, rng, self.dense)


@dataclass(kw_only=True, eq=False)
class EvalVideoDataset(VideoDataset):
    """`dataset[index]` -> the V = crops x clips views of a video, crop by crop: view = crop * num_clips + clip.

    {"clips": uint8 (V, T, 3, S, S), "labels": int64 (1,), "indices": int64 (1,)}. A frame that several clips share is
    decoded and resized once.
    """

    transform: EvalTransform
    num_clips: int = 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.records[index]
        indices = sample_test(
            self.reader.num_frames(record), self.num_segments, self.protocol, self.num_clips, self.dense
        )
        frames, places = self.read_distinct(record, indices)
        crops = self.transform(frames)  # (crops, distinct frames, 3, S, S)
        views = crops.index_select(1, torch.from_numpy(places))  # (crops, clips * T, 3, S, S)
        return {
            "clips": views.unflatten(1, indices.shape).flatten(0, 1),
            "labels": torch.tensor([record.label]),
            "indices": torch.tensor([index]),
        }
