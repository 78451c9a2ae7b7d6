"""Frames at given indices from where a data set keeps them: folders of images, or video files.

`reader.open(record)` gives a `Video`, which is dropped after its clip: no file stays open. A video or frame that cannot
be read is a DataError that names its file.
"""

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image

from datasets.annotations import VideoRecord
from datasets.decoders import DECODERS, is_mpeg_stream
from datasets.frame_files import frame_pattern
from utils.errors import ConfigError, DataError, UserError

JPEG_START = b"\xff\xd8"


@dataclass(frozen=True)
class Video:
    """An opened video: `read(indices)`, to be called once, gives the frames at ascending, distinct indices.

    A frame is RGB, uint8 (H, W, 3), contiguous.
    """

    num_frames: int
    read: Callable[[Sequence[int]], list[np.ndarray]]


class Reader(Protocol):
    """The videos below a data root."""

    def open(self, record: VideoRecord) -> Video: ...


class FrameFolderReader:
    """Videos stored as one image file per frame: index i is the file `image_tmpl.format(i + index_base)`.

    A video has as many frames as the list says or, with `count_frames`, as there are files in its folder whose names
    are `image_tmpl` with any digits for the number.
    """

    def __init__(self, root: str, image_tmpl: str, count_frames: bool = False, index_base: int = 1):
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
        self.count_frames = count_frames
        self.index_base = index_base

    def open(self, record: VideoRecord) -> Video:
        num_frames = self._count(record) if self.count_frames else record.num_frames
        return Video(num_frames, lambda indices: [self._read_frame(record, num_frames, index) for index in indices])

    def _count(self, record: VideoRecord) -> int:
        folder, template = os.path.split(os.path.join(self.root, record.path, self.image_tmpl))
        pattern = frame_pattern(template)
        files = os.listdir(folder) if os.path.isdir(folder) else []
        if count := sum(pattern.fullmatch(file) is not None for file in files):
            return count
        raise DataError(
            f"{folder}: no file like {template}; listed at {record.source}; check the data root and data.image_tmpl"
        )

    def _read_frame(self, record: VideoRecord, num_frames: int, index: int) -> np.ndarray:
        path = os.path.join(self.root, record.path, self.image_tmpl.format(index + self.index_base))
        try:
            with open(path, "rb") as file:
                return decode_image(file.read())
        except FileNotFoundError as error:
            advice = f"check the data root, data.image_tmpl, data.index_base ({self.index_base}) and num_frames"
            problem, cause = "frame missing", error
        except Exception as error:  # broken files make Pillow raise many kinds, SyntaxError and struct.error among them
            problem, advice, cause = f"frame unreadable ({error})", "extract it again", error
        listed = f"listed at {record.source} with {num_frames} frames{', as counted' if self.count_frames else ''}"
        raise DataError(f"{path}: {problem}; {listed}; {advice}") from cause


def decode_image(data: bytes) -> np.ndarray:
    """The pixels of an image file as Pillow decodes it, RGB, uint8 (H, W, 3), or Pillow's error.

    simplejpeg gives the same pixels of a JPEG file sooner, where it finds nothing amiss; Pillow takes all other files.
    """
    if data.startswith(JPEG_START):
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if colours not in ("CMYK", "YCCK"):  # which libjpeg turns into RGB by another rule than Pillow
                return simplejpeg.decode_jpeg(data, buffer=_MEMORY.take(height * width * 3))
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


class FrameMemory(threading.local):
    """Memory for frames, which is used again once nobody holds the frame any more.

    Memory that comes fresh from the system for each frame costs a third of what decoding it does.
    """

    def __init__(self):
        self._blocks: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """uint8, `size` or more, of one dimension; it is free again when this array and all views of it are gone."""
        holders = _count_holders(self._blocks)
        for number, block in enumerate(self._blocks):
            if holders[number] == _ONLY_THE_LIST and len(block) >= size:
                return block
        held = [block for block, count in zip(self._blocks, holders, strict=True) if count > _ONLY_THE_LIST]
        self._blocks = [*held, np.empty(size, np.uint8)]
        return self._blocks[-1]


def _count_holders(blocks: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(block) for block in blocks]


(_ONLY_THE_LIST,) = _count_holders([np.empty(0, np.uint8)])  # what counts itself as a holder depends on the Python
_MEMORY = FrameMemory()


class VideoFileReader:
    """Videos stored as files. Index i is the i-th frame in the order of presentation that the decoder gives.

    `decoder` is "pyav", "decord", or "auto": decord for a file that PyAV would decode twice (MPEG streams apart, which
    decord refuses), and PyAV for all others. The library is imported where it decodes, in the loader's worker.
    """

    def __init__(self, root: str, decoder: str):
        self.root = root
        self.decoder = decoder

    def open(self, record: VideoRecord) -> Video:
        """Raises ConfigError when the decoder is not installed."""
        path = os.path.join(self.root, record.path)
        if not os.path.isfile(path):
            raise DataError(
                f"{path}: no such video; listed at {record.source}; "
                "check the data root, and that lines read 'path label'"
            )
        decoder = "pyav" if self.decoder == "auto" else self.decoder
        with _named_errors(path, record, decoder):
            video = DECODERS[decoder](path)
        if self.decoder == "auto" and video.decodes_twice and not is_mpeg_stream(path):
            decoder = "decord"
            with _named_errors(path, record, decoder):
                video = DECODERS[decoder](path)

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            with _named_errors(path, record, decoder):
                return video.read(indices)

        with _named_errors(path, record, decoder):
            return Video(video.num_frames, read)


@contextlib.contextmanager
def _named_errors(path: str, record: VideoRecord, decoder: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # what a decoder raises is its own affair
        # decord puts "[time] file.cc:line: " before its message and a stack trace below it.
        reason = re.sub(r"^\[[^]]*\] \S+: ", "", (str(error) or type(error).__name__).splitlines()[0])
        advice = "data.decoder=pyav may read it" if decoder == "decord" else "fetch or encode it again"
        message = f"{path}: {decoder} cannot read it ({reason}); listed at {record.source}; {advice}"
        raise DataError(message) from error
