"""A checkpoint that answers: which class a video shows, scores, and features."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from dotmap import DotMap
from torch import Tensor

from datasets.annotations import VideoRecord, read_class_names
from datasets.loaders import build_record_loader
from datasets.sampling import sample_test
from engine.configuration import config_of_checkpoint, resolve_config
from engine.loops import view_outputs, view_scores
from inference.inputs import PathReader, given_videos
from inference.stream import Source, WindowStream
from modules.checkpoint import read_checkpoint
from modules.checkpoint_places import find_checkpoint
from modules.side4video import Side4Video
from modules.tower_files import load_whole_model
from utils.config import load_config
from utils.distributed import device_type
from utils.errors import ConfigError, DataError
from utils.precision import Precision, prepare_precision

log = logging.getLogger(__name__)

CROPS = (1, 3, 5, 10)


@dataclass(frozen=True)
class VideoScores:
    """What the model says about one video.

    path: as it was given or found
    num_frames: of the whole video, None if it could not be read
    scores: float32 (K,), mean over views of softmax(logits); None if it could not be read
    views: V = crops x clips, 0 if it could not be read
    error: one line that says why it could not be read, or None
    """

    path: str
    num_frames: int | None
    scores: np.ndarray | None
    views: int
    error: str | None = None


class FrameTokens(NamedTuple):
    """Tokens of the tower for one frame after one of its blocks.

    frame: index of the frame in the video, from 0
    layer: block of the tower, from 0
    tokens: float32 (1 + N, D), class token first
    """

    frame: int
    layer: int
    tokens: np.ndarray


class Recognizer:
    """A trained model with everything that its answers depend on: frames, pixels, class names, device, precision.

    Attributes:
        model: the model, in eval mode on `precision.device`.
        config: the resolved configuration: the checkpoint's, with `overrides`.
        class_names: K names in label order; "class 3" where nobody named them.
    """

    def __init__(self, model: Side4Video, config: DotMap, class_names: list[str], precision: Precision):
        """For a model that is at hand; `load` makes one from a file. `model` must be on `precision.device`."""
        self.model = model.eval()
        self.config = config
        self.class_names = class_names
        self.precision = precision

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        config: str | Path | None = None,
        weights: str | Path | None = None,
        device: str | torch.device = "auto",
        precision: str = "amp",
        workers: int = 0,
        overrides: Sequence[str] = (),
    ) -> "Recognizer":
        """
        Args:
            checkpoint: file of a run (.pt), of tools/convert_checkpoint.py (.safetensors), or a released one; the
                folder of a run, whose model_best.pt is taken; a folder with one such file, as tools/publish.py writes
                it; or `org/name` of the Hugging Face Hub (modules.checkpoint_places.find_checkpoint).
            config: YAML file, for a released checkpoint, which holds none. Ours hold theirs.
            weights: file of the tower. None looks in clip_pretrain/ for the one with the checkpoint's hash.
            device: `auto` is the GPU if there is one, else the CPU.
            precision: `amp` (bf16 where the GPU has it, else fp16; fp32 on a CPU), `bf16`, `fp16` or `fp32`. It also
                decides the type of the tower, unless `overrides` do; network.backbone_dtype=auto takes bfloat16 for
                `amp` on a CPU that has units for it.
            workers: loader processes; 0 reads in this one.
            overrides: `key=value` in place of the configuration's, such as data.image_tmpl=frame_{:06d}.png

        Raises:
            CheckpointError: a file cannot be read or does not fit, or the tower is nowhere.
            ConfigError: a configuration is missing, in the way, or not valid, or the device does not exist.
        """
        path = find_checkpoint(checkpoint)
        content = read_checkpoint(path)
        chosen = choose_device(device)
        settings = read_settings(content, path, config, overrides, chosen, precision, workers)
        model = load_whole_model(settings, content, path, weights)
        model.place(chosen)
        if settings.network.backbone_dtype != "float32":
            log.info("the tower runs in %s on %s", settings.network.backbone_dtype, chosen)
        names = class_names_of(content, settings)
        return cls(model, settings, names, prepare_precision(settings.solver, chosen))

    def predict(self, path: str | Path, topk: int = 5, crops: int = 1, clips: int = 1) -> list[tuple[str, float]]:
        """(class name, score) of the `topk` highest scores of one video, the highest first; arguments of `scores`."""
        (scores,) = self.scores([path], crops, clips)
        return [(self.class_names[label], float(scores[label])) for label in top_classes(scores, topk)]

    def scores(self, paths: Sequence[str | Path], crops: int = 1, clips: int = 1) -> np.ndarray:
        """float32 (videos, K), the mean over V = crops x clips views of softmax(logits): what test.py writes.

        Args:
            paths: video files, folders of frames and zip files of frames, one video each.
            crops: 1, 3, 5 or 10 crops of a clip.
            clips: clips of a video.

        Raises:
            DataError: a video cannot be read; `score_videos` goes on without it.
        """
        return np.stack([self._checked(video) for video in self.score_videos(self._given(paths), crops, clips)])

    def score_videos(self, records: list[VideoRecord], crops: int = 1, clips: int = 1) -> Iterator[VideoScores]:
        """The scores of each record, in order, as they are computed; a video that cannot be read stops nothing."""
        for record, num_frames, scores, error in self.outputs(records, self.model, view_scores, crops, clips):
            if scores is None:
                yield VideoScores(record.name, None, None, 0, error)
            else:
                yield VideoScores(record.name, num_frames, scores.cpu().numpy(), crops * clips)

    def features(
        self, path: str | Path, tokens: bool = False, crops: int = 1, clips: int = 1
    ) -> np.ndarray | Iterator[FrameTokens]:
        """What the head reads, float32 (S,), as the mean over the views of one video.

        With `tokens`, the tower's tokens instead, frame by frame and layer by layer, of one crop of one clip: an
        iterator of FrameTokens that holds one layer at a time. The layers are those that the side network reads.

        Raises:
            DataError: the video cannot be read.
            ValueError: `tokens` of several views.
        """
        if tokens:
            if crops != 1 or clips != 1:
                raise ValueError("tokens are those of one view: leave crops and clips at 1")
            return self._frame_tokens(path)
        ((_, _, features, error),) = self.outputs(self._given([path]), self.clip_features, mean_of_views, crops, clips)
        if features is None:
            raise DataError(str(error))
        return features.cpu().numpy()

    def stream(self, source: Source, window: float, stride: float | None = None, **options: Any) -> WindowStream:
        """An iterator over windows (start, end, scores) of a long video, a live stream or frames.

        Each frame goes through the tower once, however many windows it belongs to. Arguments, options and errors are
        those of `inference.stream.WindowStream`.
        """
        return WindowStream(self.model, self.precision, self.config, source, window, stride, **options)

    def clip_features(self, clips: Tensor) -> Tensor:
        """Normalised clips (B, T, 3, H, W) -> what the head reads of each, (B, S)."""
        return self.model.trained.side(clips, self.model.backbone.layer_tokens(clips))

    def outputs(
        self,
        records: list[VideoRecord],
        forward: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor],
        crops: int = 1,
        clips: int = 1,
    ) -> Iterator[tuple[VideoRecord, int | None, Tensor | None, str | None]]:
        """(record, number of frames, output, None) of each video, or (record, None, None, why it cannot be read).

        In the order of `records`, by the loader and the loop of test.py.

        Args:
            records: of `find_videos` or `given_videos`.
            forward: that of `engine.loops.view_outputs`.
            finish: maps the outputs of a batch, (videos, V, ...), to (videos, ...): one output a video.
        """
        check_views(crops, clips)
        loader = build_record_loader(self.config, records, PathReader(self.config.data), clips=clips, crops=crops)
        given = reported = 0

        def unreadable_until(index: int) -> Iterator[tuple[VideoRecord, None, None, str]]:
            nonlocal given, reported
            while given < index:
                number, reason = loader.unreadable[reported]
                if number != given:
                    raise RuntimeError("a video was passed over; the loader is at fault")
                yield records[given], None, None, reason
                given, reported = given + 1, reported + 1

        for batch, outputs in view_outputs(self.model, loader, self.precision, self.config, forward):
            indices, num_frames = batch["indices"].tolist(), batch["num_frames"].tolist()
            for index, frames, output in zip(indices, num_frames, finish(outputs), strict=True):
                yield from unreadable_until(index)
                yield records[index], frames, output, None
                given += 1
        yield from unreadable_until(len(records))

    def _given(self, paths: Sequence[str | Path]) -> list[VideoRecord]:
        if isinstance(paths, str | os.PathLike):
            raise TypeError("scores() takes a list of paths; for one video, write scores([path])")
        if not paths:
            raise DataError("no videos given")
        return given_videos(paths)

    @staticmethod
    def _checked(video: VideoScores) -> np.ndarray:
        if video.scores is None:
            raise DataError(str(video.error))
        return video.scores

    def _frame_tokens(self, path: str | Path) -> Iterator[FrameTokens]:
        data, tower = self.config.data, self.model.backbone
        # The loop gives the normalised clip itself, so that layers can be computed one at a time.
        ((_, num_frames, clips, error),) = self.outputs(self._given([path]), lambda clips: clips, lambda clips: clips)
        if clips is None or num_frames is None:
            raise DataError(str(error))
        frames = sample_test(num_frames, data.num_segments, data.protocol, dense=data.dense)[0].tolist()
        return (
            FrameTokens(frame, layer, of_frame)
            for layer, tokens in zip(tower.layers, tower.layer_tokens(clips), strict=True)
            for frame, of_frame in zip(frames, tokens[0].float().cpu().numpy(), strict=True)
        )


def mean_of_views(features: Tensor) -> Tensor:
    """(videos, V, S) -> float32 (videos, S)."""
    return features.float().mean(dim=1)


def top_classes(scores: np.ndarray, topk: int) -> list[int]:
    """Labels of the `topk` highest of K scores, the highest first; of equal ones the lower label, as in accuracy."""
    return np.argsort(-scores, kind="stable")[:topk].tolist()


def check_views(crops: int, clips: int) -> None:
    if crops not in CROPS:
        raise ConfigError(f"crops: must be one of {', '.join(map(str, CROPS))}, got {crops}")
    if clips < 1:
        raise ConfigError(f"clips: must be at least 1, got {clips}")


def choose_device(device: str | torch.device) -> torch.device:
    """Raises ConfigError for one that this machine has not."""
    if device == "auto":
        return torch.device(device_type())
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device: {device} cannot be used here ({reason}); auto chooses one") from error
    return chosen


def read_settings(
    checkpoint: dict[str, Any],
    path: Path,
    config: str | Path | None,
    overrides: Sequence[str],
    device: torch.device,
    precision: str,
    workers: int,
) -> DotMap:
    """The resolved configuration that a checkpoint answers by; arguments and errors of `Recognizer.load`."""
    machine = [f"data.workers={workers}", f"solver.precision={precision}", "solver.compile=False"]
    overrides = [*machine, "network.shard_backbone=False", *overrides]
    if config is None:
        return config_of_checkpoint(checkpoint, path, overrides, "model", device, predicting=True)
    if checkpoint.get("config"):
        raise ConfigError(
            f"{config}: not needed, {path} holds its own configuration; leave it out, and change keys by overrides"
        )
    return resolve_config(load_config(str(config), overrides, "model"), device, predicting=True)


def class_names_of(checkpoint: dict[str, Any], config: DotMap) -> list[str]:
    """The K names of the checkpoint; those of `data.label_list` if it is a released one, which has none.

    Raises:
        DataError: the list cannot be read.
    """
    data = config.data
    if names := checkpoint.get("class_names"):
        return list(names)
    if not checkpoint.get("config") and data.label_list:
        return read_class_names(data.label_list, data.num_classes)
    return [f"class {label}" for label in range(data.num_classes)]
