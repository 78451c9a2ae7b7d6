"""Frames of a data set at given indices, from folders of images or from video files.

`reader.open(record)` returns an `OpenedVideo`, which is used for one clip. Its files are closed when it is dropped. A
video or frame that cannot be read raises a DataError that names its file.
"""

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from datasets.annotations import COLUMNS, SEGMENT_COLUMNS, VideoRecord
from datasets.decoders import DECODERS, Damage, FrameCountError, VideoDecoder, describe_damage, is_mpeg_stream
from datasets.frame_archives import SUFFIX, Frames, open_frames
from datasets.frame_files import frame_pattern
from datasets.segments import SegmentDecoder, SegmentError
from utils.errors import DataError, UserError

MOST_PIXELS = 100 * 10**6  # of an image; a damaged or hostile header must not fill the memory
JPEG_START = b"\xff\xd8"


@dataclass(frozen=True)
class OpenedVideo:
    """A video whose frames can be read; a context manager that reuses the memory of the frames.

    `read(indices)` returns the frames at ascending, distinct indices, each RGB, uint8 (H, W, 3), contiguous. It may be
    called once. `close()`, or the end of a `with` block, gives the memory of these frames back to the reader, and later
    videos overwrite it. A video that is never closed keeps its frames.

    A video is damaged if something in its files could not be decoded, and `read` gave what could. `damage()`, called
    after `read`, says in one line what that was, or returns None. If damage leaves fewer frames than `num_frames`,
    `read` raises a FrameCountError with their number, and may be called once more.
    """

    num_frames: int
    read: Callable[[Sequence[int]], list[np.ndarray]]
    close: Callable[[], None] = lambda: None
    damage: Callable[[], str | None] = lambda: None

    def __enter__(self) -> "OpenedVideo":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Reader(Protocol):
    """Opens the videos below a data root."""

    def open(self, record: VideoRecord) -> OpenedVideo: ...


class FrameBuffers:
    """Memory for the decoded frames of one clip.

    Memory fresh from the operating system costs about a third of the time that decoding a JPEG frame takes. So blocks
    are reused: `take` prefers a block of `free`, and `release` puts all taken blocks there. Clips that share the list
    `free` never share a block that is in use.
    """

    def __init__(self, free: list[np.ndarray]):
        self._free = free
        self._taken: list[np.ndarray] = []

    def take(self, size: int) -> np.ndarray:
        """Return a one-dimensional uint8 array of at least `size` elements, which nobody else uses until `release`."""
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(size, np.uint8)
        if len(block) < size:  # a small block is dropped, so that all blocks become as large as the largest frames
            block = np.empty(size, np.uint8)
        self._taken.append(block)
        return block

    def release(self) -> None:
        """Give back all blocks. Arrays in them must no longer be used."""
        self._free += self._taken
        self._taken = []


class FrameFolderReader:
    """Reads videos that are stored as one image file per frame, in a folder `path` or packed in a file `path.zip`.

    Index i is the file `image_tmpl.format(i + index_base)`, after the first frame of a segment. The number of frames is
    that of the list or, with `count_frames`, the number of files in the folder that are named as `image_tmpl` names a
    number.
    """

    def __init__(self, root: str, image_tmpl: str, count_frames: bool = False, index_base: int = 1):
        self.root = root
        self.image_tmpl = image_tmpl
        self.count_frames = count_frames
        self.index_base = index_base
        self._below, self._template = os.path.split(image_tmpl)
        if "{" in self._below or "}" in self._below:  # the number may be in the name of a folder
            self._below, self._template = "", image_tmpl
        self._free_blocks: list[np.ndarray] = []  # of FrameBuffers

    def open(self, record: VideoRecord) -> OpenedVideo:
        """Raises DataError if frames are counted and there are none."""
        num_frames = self._count(record) if self.count_frames else record.num_frames
        assert num_frames is not None  # lists of frame folders have this column
        buffers, complaints = FrameBuffers(self._free_blocks), dict[str, str]()

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            with self._frames(record) as frames:
                return [self._read_frame(frames, record, num_frames, index, buffers, complaints) for index in indices]

        def damage() -> str | None:
            if not complaints:
                return None
            path, complaint = next(iter(complaints.items()))
            more = f" and {len(complaints) - 1} more frames" if len(complaints) > 1 else ""
            return f"{path}{more}: damaged ({complaint}); listed at {record.source}"

        return OpenedVideo(num_frames, read, buffers.release, damage)

    def _frames(self, record: VideoRecord) -> Frames:
        """Raises DataError for a packed file that is not complete."""
        try:
            return open_frames(os.path.join(self.root, record.path, self._below))
        except DataError as error:
            raise DataError(f"{error.line}; listed at {record.source}") from error

    def _count(self, record: VideoRecord) -> int:
        pattern = frame_pattern(self._template)
        files: set[str] = set()
        with self._frames(record) as frames, contextlib.suppress(OSError):
            files = frames.names()
        if count := sum(pattern.fullmatch(file) is not None for file in files):
            return count
        advice = "check the data root and data.image_tmpl"
        if os.path.isfile(frames.path) and not frames.path.endswith(SUFFIX):
            advice = "data.modality: video reads video files"
        raise DataError(f"{frames.path}: no file like {self._template}; listed at {record.source}; {advice}")

    def _read_frame(
        self,
        frames: Frames,
        record: VideoRecord,
        num_frames: int,
        index: int,
        buffers: FrameBuffers,
        complaints: dict[str, str],
    ) -> np.ndarray:
        name = self._template.format(index + (record.first_frame or 0) + self.index_base)
        path = os.path.join(frames.path, name)
        try:
            pixels, complaint = decode_image(frames.read(name), buffers)
            if complaint is not None:
                complaints[path] = complaint
            return pixels
        except UserError as error:  # of a packed file, which it names
            raise DataError(f"{error.line}; listed at {record.source}") from error
        except Exception as error:  # for broken files Pillow raises many types, among them SyntaxError and struct.error
            if isinstance(error, FileNotFoundError):
                problem = "frame missing"
                advice = f"check the data root, data.image_tmpl, data.index_base ({self.index_base}) and num_frames"
            elif isinstance(error, NotADirectoryError):
                problem, advice = "not in a folder, but in a file", "data.modality: video reads video files"
            else:
                reason = "it is not an image" if isinstance(error, UnidentifiedImageError) else error
                problem, advice = f"frame unreadable ({reason})", "extract it again"
            listed = f"listed at {record.source} with {num_frames} frames{', as counted' if self.count_frames else ''}"
            raise DataError(f"{path}: {problem}; {listed}; {advice}") from error


class TooManyPixels(Exception):
    """The header of an image promises more than MOST_PIXELS."""

    def __init__(self, width: int, height: int):
        super().__init__(f"its header promises {width} x {height} pixels, more than {MOST_PIXELS // 10**6} megapixels")


def decode_image(data: bytes, buffers: FrameBuffers) -> tuple[np.ndarray, str | None]:
    """Decode an image file to RGB, uint8 (H, W, 3), with the pixels that Pillow returns; and what is damaged in it.

    simplejpeg decodes JPEG files, faster and with equal pixels, into memory of `buffers`. Pillow decodes other formats,
    CMYK images and the JPEG files that simplejpeg finds damaged.

    Raises:
        Exception: what Pillow raises for the file.
    """
    complaint = None
    if data.startswith(JPEG_START):
        try:
            height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
            if height * width > MOST_PIXELS:
                raise TooManyPixels(width, height)
            if colours not in ("CMYK", "YCCK"):  # libjpeg converts these to RGB differently than Pillow
                return simplejpeg.decode_jpeg(data, buffer=buffers.take(height * width * 3)), None
        except ValueError as error:
            complaint = str(error)
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MOST_PIXELS:
            raise TooManyPixels(image.width, image.height)
        return seen_by_a_person(image), complaint


def seen_by_a_person(image: Image.Image) -> np.ndarray:
    """An image of any of Pillow's modes as RGB, uint8 (H, W, 3).

    Levels of 16 bits are scaled to 8 bits, where Pillow's own conversion makes all above 255 white.

    Raises:
        ValueError: the image does not say what a person sees: levels without a range, or transparent pixels, whose
            colour is that of what lies behind.
    """
    mode, wide = image.mode, image.mode.startswith("I;16")
    if wide or (mode == "I" and image.format == "PNG"):  # Pillow 10 opens PNG files of 16 bits so
        levels = np.asarray(image).astype(np.uint32)
        return np.repeat(((levels * 255 + 32767) // 65535).astype(np.uint8)[..., None], 3, axis=2)
    if mode in ("I", "F"):
        raise ValueError(f"its mode is {mode}, which states no range of levels; save it with 8 or 16 bits")
    if "transparency" in image.info or mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        alpha = np.asarray(image.convert("RGBA").getchannel("A"))
        if alpha.min(initial=255) < 255:
            share = (alpha < 255).mean() * 100
            raise ValueError(f"{share:.0f} % of its pixels are transparent; save it on a background, without alpha")
    return np.array(image.convert("RGB"))


class VideoFileReader:
    """Reads videos that are stored as video files. Index i is the i-th frame in the order of presentation.

    `decoder` is "pyav", "decord" or "auto". With "auto", PyAV reads all files except those that it would decode twice,
    which decord reads, or PyAV if decord cannot. MPEG streams always go to PyAV, because decord refuses them. The
    library is imported when a video is opened, in the loader's worker.
    """

    def __init__(self, root: str, decoder: str):
        self.root = root
        self.decoder = decoder

    def open(self, record: VideoRecord) -> OpenedVideo:
        """Raises DataError if the file is missing or cannot be read, ConfigError if the decoder is not installed."""
        path = os.path.join(self.root, record.path)
        if not os.path.isfile(path):
            raise DataError(
                f"{path}: no such video; listed at {record.source}; "
                f"check the data root, and that lines read '{self._line(record)}'"
            )
        if record.first_frame is not None:
            return self._open_segment(path, record, record.first_frame)
        name = "pyav" if self.decoder == "auto" else self.decoder
        # decord, too, takes what precedes a colon for a protocol, except in an absolute path.
        absolute = os.path.abspath(path)
        with _named_errors(path, record, name):
            decoder = DECODERS[name](absolute)
        if self.decoder == "auto" and decoder.decodes_twice and not is_mpeg_stream(path):
            decoder = _DecordOrPyAV(absolute, decoder)

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            with _named_errors(path, record, name):
                return decoder.read(indices)

        with _named_errors(path, record, name):
            return OpenedVideo(decoder.num_frames, read, damage=lambda: _damage_of(path, record, decoder.damage))

    @staticmethod
    def _line(record: VideoRecord) -> str:
        return " ".join(COLUMNS["video"] if record.first_frame is None else SEGMENT_COLUMNS)

    def _open_segment(self, path: str, record: VideoRecord, first: int) -> OpenedVideo:
        assert record.num_frames is not None  # lists of segments have this column
        name = "decord" if self.decoder == "decord" else "pyav"
        with _named_errors(path, record, name):
            segment = SegmentDecoder(path, first, record.num_frames, DECODERS[name] if name == "decord" else None)

        def read(indices: Sequence[int]) -> list[np.ndarray]:
            with _named_errors(path, record, name):
                return segment.read(indices)

        return OpenedVideo(segment.num_frames, read, damage=lambda: _damage_of(path, record, segment.damage))


class _DecordOrPyAV:
    """Reads a video with decord, and with PyAV if decord cannot open it or return the frames.

    decord does not say which frames it has filled up by guessing, so `damage` is that which PyAV meets.
    """

    decodes_twice = False

    def __init__(self, path: str, pyav: VideoDecoder):
        self._pyav = pyav
        self._decord: VideoDecoder | None = None
        # decord raises many exception types, and a ConfigError if it is not installed.
        with contextlib.suppress(Exception):
            self._decord = DECODERS["decord"](path)
        self.num_frames = (self._decord or pyav).num_frames

    @property
    def damage(self) -> Damage:
        return self._pyav.damage

    def read(self, indices: Sequence[int]) -> list[np.ndarray]:
        if self._decord is not None:
            with contextlib.suppress(Exception):
                return self._decord.read(indices)
            promised, self._decord, self.num_frames = self.num_frames, None, self._pyav.num_frames
            if self.num_frames != promised:
                raise FrameCountError(promised, self.num_frames)
        return self._pyav.read(indices)


def _damage_of(path: str, record: VideoRecord, met: Damage) -> str | None:
    found = describe_damage(path, met)
    return f"{path}: damaged ({found}); listed at {record.source}" if found else None


@contextlib.contextmanager
def _named_errors(path: str, record: VideoRecord, decoder: str) -> Iterator[None]:
    """Turn the errors of a decoder into DataErrors that name the file and its line in the list."""
    try:
        yield
    except (UserError, FrameCountError):
        raise
    except SegmentError as error:
        raise DataError(f"{path}: {error}; listed at {record.source}") from error
    except Exception as error:  # decoders raise many exception types
        # decord puts "[time] file.cc:line: " before its message and a stack trace below it.
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__  # PyAV's has more in new versions
        reason = re.sub(r"^\[[^]]*\] \S+: ", "", text.splitlines()[0])
        advice = "data.decoder=pyav may read it" if decoder == "decord" else "fetch or encode it again"
        message = f"{path}: {decoder} cannot read it ({reason}); listed at {record.source}; {advice}"
        raise DataError(message) from error
