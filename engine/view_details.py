"""What a test keeps of each video beside its scores: scores of fewer views, number of frames, and tiny pictures.

Letters: V views of a video, T frames of a clip, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from datasets.transforms import CENTRE_CROP
from utils.distributed import all_reduce

THUMBNAIL = 4  # height and width
STRIDE = 4  # of the pixels that count in a thumbnail: the others cost time and say little


@dataclass(frozen=True)
class ViewSet:
    """Some of the V views of a video.

    crops, clips: number of crops of a clip, and of clips of a video
    views: their places among the V views
    """

    crops: int
    clips: int
    views: tuple[int, ...]


def view_sets(crops: int, clips: int, first_clip: bool) -> list[ViewSet]:
    """The sets of fewer views that a test with crops x clips views contains, the smallest first.

    One crop is the centre one. One clip is the one whose frames are those of a test with one clip, or the nearest to
    it: the first clip with `first_clip`, as in plain sampling of protocol kinetics, else the middle one.
    """
    clip = 0 if first_clip else (clips - 1) // 2
    all_crops, all_clips = range(crops), range(clips)
    chosen = {
        (1, 1): ([CENTRE_CROP[crops]], [clip]),
        (crops, 1): (all_crops, [clip]),
        (1, clips): ([CENTRE_CROP[crops]], all_clips),
    }
    return [
        ViewSet(*size, tuple(crop * clips + clip for crop in of_crops for clip in of_clips))
        for size, (of_crops, of_clips) in chosen.items()
        if size != (crops, clips)
    ]


class VideoDetails:
    """Details of the videos of a test, filled batch by batch on each process; after `finish`, every process has all.

    Attributes:
        sets: the sets of fewer views.
        set_scores: float32 (videos, sets, K), as the scores, of each set alone.
        num_frames: int64 (videos,), of the whole video; 0 if it could not be read.
        thumbnails: float32 (videos, T, 4, 4), grey levels of each frame in a view of the first set, or in the only
            view; 0 if the video could not be read.
        unreadable, damaged: [(index, message of one line)], in list order.
    """

    NAMES = ("set_scores", "num_frames", "thumbnails")

    def __init__(self, num_videos: int, num_classes: int, num_segments: int, sets: list[ViewSet]):
        self.sets = sets
        self.unreadable: list[tuple[int, str]] = []
        self.damaged: list[tuple[int, str]] = []
        self.set_scores = np.zeros((num_videos, len(sets), num_classes), np.float32)
        self.num_frames = np.zeros(num_videos, np.int64)
        self.thumbnails = np.zeros((num_videos, num_segments, THUMBNAIL, THUMBNAIL), np.float32)

    def add(self, batch: dict[str, Tensor], set_scores: list[Tensor]) -> dict[str, np.ndarray]:
        """Keep the details of the videos of a batch, and return them by name, (videos of the batch, ...).

        Args:
            batch: of `build_eval_loader`.
            set_scores: (videos of the batch, K) of each set.
        """
        indices = batch["indices"].numpy()
        view = self.sets[0].views[0] if self.sets else 0
        clips = batch["clips"].unflatten(0, (len(indices), -1))[:, view, ..., ::STRIDE, ::STRIDE]
        self.num_frames[indices] = batch["num_frames"].numpy()
        self.thumbnails[indices] = F.adaptive_avg_pool2d(clips.float().mean(dim=2), THUMBNAIL).numpy()
        for place, scores in enumerate(set_scores):
            self.set_scores[indices, place] = scores.cpu().numpy()
        return {name: getattr(self, name)[indices] for name in self.NAMES}

    def restore(self, index: int, row: dict[str, np.ndarray]) -> None:
        """Take over the details of a video that an interrupted test has left."""
        for name in self.NAMES:
            getattr(self, name)[index] = row[name]

    def finish(self, unreadable: list[tuple[int, str]], damaged: list[tuple[int, str]], device: torch.device) -> None:
        """Put the details of all processes together.

        Args:
            unreadable, damaged: videos of all processes.
            device: of the evaluation; processes exchange tensors there.
        """
        self.unreadable, self.damaged = unreadable, damaged
        for name in self.NAMES:
            if (values := getattr(self, name)).size:
                setattr(self, name, all_reduce(torch.from_numpy(values).to(device)).cpu().numpy())
