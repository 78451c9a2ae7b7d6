"""Frames at given indices from where a data set keeps them."""

import os
from collections.abc import Iterable

from PIL import Image

from datasets.annotations import VideoRecord
from utils.errors import ConfigError, DataError


class FrameFolderReader:
    """Videos stored as one image file per frame, numbered from 1: index i is the file `image_tmpl.format(i + 1)`."""

    def __init__(self, root: str, image_tmpl: str):
        """Raises ConfigError for a template that does not make a file name of a number."""
        try:
            numbered = image_tmpl.format(1) != image_tmpl.format(2)
        except (ValueError, LookupError):
            numbered = False
        if not numbered:
            raise ConfigError(
                f"data.image_tmpl: {image_tmpl!r} does not turn a frame number into a file name, "
                "write it like 'img_{:05d}.jpg'"
            )
        self.root = root
        self.image_tmpl = image_tmpl

    def num_frames(self, record: VideoRecord) -> int:
        """Number of frames to draw indices from."""
        return record.num_frames

    def read(self, record: VideoRecord, indices: Iterable[int]) -> list[Image.Image]:
        """RGB frames at zero-based `indices`, which should be distinct: each is decoded anew.

        Raises DataError, naming the frame's file, for a frame that is missing or cannot be decoded completely.
        """
        return [self._read_frame(record, index) for index in indices]

    def _read_frame(self, record: VideoRecord, index: int) -> Image.Image:
        path = os.path.join(self.root, record.path, self.image_tmpl.format(index + 1))
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except FileNotFoundError as error:
            problem, advice, cause = "frame missing", "check the data root, data.image_tmpl and num_frames", error
        except Exception as error:  # broken files make Pillow raise many kinds, SyntaxError and struct.error among them
            problem, advice, cause = f"frame unreadable ({error})", "extract it again", error
        listed = f"listed at {record.source} with {record.num_frames} frames"
        raise DataError(f"{path}: {problem}; {listed}; {advice}") from cause
