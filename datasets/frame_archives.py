"""The frame files of one video: in a folder, or packed in one uncompressed zip file.

`open_frames(path)` finds out which of the two exists: the folder `path`, otherwise the file `path.zip`.
"""

import contextlib
import os
import stat
import struct
import zipfile
import zlib
from typing import Protocol, TypeAlias

from utils.errors import DataError

SUFFIX = ".zip"

_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file
_LOCATOR = struct.Struct("<4sLQL")  # before it in a large file: where the record of the large form is
_LARGE_END = struct.Struct("<4sQ2H2L4Q")  # the record of the large form
# An entry of the directory: flags, method, checksum, size, lengths of the three parts that follow, start. The parts are
# the name, extra fields and a comment.
_ENTRY = struct.Struct("<8x2H4xL4xL3H8xL")
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before the content of a file; name and extra fields follow
_ENTRY_SIZE, _LOCAL_SIZE = _ENTRY.size, _LOCAL.size
_ENCRYPTED, _LARGE_16, _LARGE_32 = 1, 0xFFFF, 0xFFFFFFFF  # the last two: the true number is in the large form
_LARGE_FIELD = 1  # number of the extra field with the true numbers of an entry

_ADVICE = "pack the frames again with tools/prepare_data.py pack"
NO_FILE = "a pipe, a socket, a device or a folder"

# A longer directory is not read as a whole: a film of 100,000 frames has one of 6 MB, for a few wanted entries.
LONGEST_DIRECTORY = 2**16  # bytes
END_BLOCK = 20 * 2**10  # bytes at the end of a file that are read first; they hold the directory of 340 frames


class Frames(Protocol):
    """The frame files of one video; a context manager.

    path: the folder or the zip file
    """

    path: str

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError if there is none of this name."""

    def names(self) -> set[str]:
        """Return the names of all files. Raises OSError if there is no folder."""

    def __enter__(self) -> "Frames": ...

    def __exit__(self, *error: object) -> None: ...


def open_frames(path: str) -> Frames:
    """Return the frames of the folder `path`, or of the zip file `path.zip` if there is no such folder.

    A `path` that is itself the name of a zip file is accepted too.

    Raises:
        DataError: the zip file cannot be opened, or is no complete zip file.
    """
    path = path.rstrip(os.sep) or path
    if not os.path.isdir(path):
        try:
            return FrameArchive(path + SUFFIX)
        except _NoArchive:
            if path.lower().endswith(SUFFIX):
                with contextlib.suppress(_NoArchive):
                    return FrameArchive(path)
    return FrameFolder(path)


def archive_of(path: str) -> str | None:
    """Return the zip file that `open_frames(path)` reads, or None: then it reads the folder `path`."""
    path = path.rstrip(os.sep) or path
    if os.path.isdir(path):
        return None
    if os.path.exists(path + SUFFIX):
        return path + SUFFIX
    return path if path.lower().endswith(SUFFIX) and os.path.exists(path) else None


class FrameFolder:
    """Frame files in a folder."""

    def __init__(self, path: str):
        self.path = path

    def read(self, name: str) -> bytes:
        """Raises OSError if it is no file."""
        with open(os.path.join(self.path, name), "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(NO_FILE)
            return file.read()

    def names(self) -> set[str]:
        return set(os.listdir(self.path))

    def __enter__(self) -> "FrameFolder":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: opening a pipe waits for somebody who writes into it."""
    return os.open(path, flags | os.O_NONBLOCK)


class _NoArchive(DataError):
    """There is no such file."""


# What the directory of a zip file says about one file: its name; whether the content is neither compressed nor
# encrypted; checksum and bytes of the content; place of the header before the content; bytes of this entry.
Entry: TypeAlias = tuple[bytes, bool, int, int, int, int]


class FrameArchive:
    """Frame files in a zip file without compression.

    Python's zipfile makes an object for every entry of the directory, which takes longer than reading a few frames. So
    the directory is kept as one block of bytes, and a name is searched in it, from the last one found on: frames are
    read in ascending order. In a long directory whose entries are equally long and sorted by name, as `pack` writes
    them, the name is found by bisection.
    """

    def __init__(self, path: str):
        """Raises DataError if the file cannot be opened, or is no complete zip file."""
        self.path = path
        try:
            self._file = _open_at_once(path, os.O_RDONLY)
        except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL character in the path
            raise _NoArchive(f"{path}: no such file") from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: is {NO_FILE}; {_ADVICE}")
            self._size = status.st_size
            block = self._at(max(0, self._size - END_BLOCK), END_BLOCK)
            self._count, self._length, self._start = self._find_directory(block)
            # A block of bytes that holds the directory, and the place in it where the directory begins. The directory
            # is not cut out of the block: memory for a copy takes longer than a look-up in it.
            self._directory: bytes | None = None
            self._begin = self._start - (self._size - len(block))
            if self._begin >= 0:
                self._directory = block
            elif self._length <= LONGEST_DIRECTORY:
                self._whole_directory()
            self._last = max(0, self._begin)  # place in the block of the last entry found
        except BaseException:
            os.close(self._file)
            raise

    def read(self, name: str) -> bytes:
        """Raises DataError if the file is compressed, or if its content does not have the stated checksum."""
        key = name.encode("utf-8", "surrogateescape")
        if (content := self._read_plain(key)) is not None:
            return content
        entry = (self._bisect(key) if self._directory is None else None) or self._search(key)
        if entry is None:
            raise FileNotFoundError(name)
        _, plain, checksum, size, start, _ = entry
        if not plain:
            raise DataError(f"{self.path}: {name} is compressed or encrypted; {_ADVICE}")
        begin = start + _LOCAL_SIZE + len(key)
        if begin + size > self._start:  # the contents end where the directory starts
            raise DataError(f"{self.path}: {name} is damaged: it ends behind the end of the contents; {_ADVICE}")
        # The header before the content repeats the name. It is read only if the content is not right behind it.
        content = self._at(begin, size)
        if zlib.crc32(content) != checksum:
            header = self._at(start, _LOCAL_SIZE)
            extra = _LOCAL.unpack(header)[-1] if len(header) == _LOCAL_SIZE else 0
            content = self._at(begin + extra, size)
            if zlib.crc32(content) != checksum:
                raise DataError(f"{self.path}: {name} is damaged: its checksum is not the stated one; {_ADVICE}")
        return content

    def _read_plain(self, key: bytes) -> bytes | None:
        """Return what `read` does for an intact frame as `pack` writes it, in less time; otherwise None."""
        directory = self._directory
        if directory is None or (begin := directory.find(key, self._last) - _ENTRY_SIZE) < self._begin:
            return None
        if not directory.startswith(b"PK\1\2", begin):
            return None
        flags, method, checksum, size, length, _, _, start = _ENTRY.unpack_from(directory, begin)
        start += _LOCAL_SIZE + length
        if length != len(key) or flags & _ENCRYPTED or method != zipfile.ZIP_STORED or start + size > self._start:
            return None
        self._last = begin
        try:
            content = os.pread(self._file, size, start)
        except OSError:
            return None
        return content if zlib.crc32(content) == checksum else None

    def names(self) -> set[str]:
        """Raises DataError if the directory is damaged."""
        return set(self.sizes())

    def sizes(self) -> dict[str, int]:
        """Return {name: bytes} of all files. Raises DataError if the directory is damaged."""
        directory, found = self._whole_directory(), {}
        place = self._begin
        end = place + self._length
        while place < end:
            name, _, _, size, _, length = self._entry(directory, place)
            place += length
            if not name.endswith(b"/"):
                found[os.fsdecode(name)] = size
        return found

    def __enter__(self) -> "FrameArchive":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)

    def _at(self, place: int, length: int) -> bytes:
        """Read `length` bytes at a place; fewer at the end of the file. Raises DataError if the disk fails."""
        if place + length > self._size:  # a damaged number must not fill the memory
            if place >= self._size:
                return b""
            length = self._size - place
        try:
            block = os.pread(self._file, length, place)
            while len(block) < length and (more := os.pread(self._file, length - len(block), place + len(block))):
                block += more  # one call returns at most 2 GiB
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror}") from error
        return block

    def _find_directory(self, block: bytes) -> tuple[int, int, int]:
        """Return the number of entries of the directory, its bytes, and its place; `block` ends where the file ends."""
        end = self._size - _END.size
        if end < 0:
            raise self._incomplete()
        mark, *_, count, length, start, _ = _END.unpack_from(block, len(block) - _END.size)
        if mark != b"PK\5\6":
            raise self._incomplete()
        if count == _LARGE_16 or _LARGE_32 in (length, start):
            end -= _LOCATOR.size
            mark, _, place, _ = _LOCATOR.unpack(self._at(end, _LOCATOR.size)) if end >= 0 else (b"", 0, 0, 0)
            record = self._at(place, _LARGE_END.size) if mark == b"PK\6\7" else b""
            if len(record) < _LARGE_END.size or not record.startswith(b"PK\6\6"):
                raise self._incomplete()
            *_, count, length, start = _LARGE_END.unpack(record)
            end = place
        if start + length != end:
            raise self._incomplete()
        return count, length, start

    def _incomplete(self) -> DataError:
        return DataError(f"{self.path}: is no complete zip file of frames; {_ADVICE}")

    def _whole_directory(self) -> bytes:
        """Return the block that holds the directory, from `_begin` on."""
        if self._directory is None:
            self._begin, self._directory = 0, self._at(self._start, self._length)
        return self._directory

    def _entry(self, directory: bytes, place: int) -> Entry:
        """Return the entry at a place of a block of the directory. Raises DataError if there is none."""
        end = place + _ENTRY_SIZE
        if not directory.startswith(b"PK\1\2", place) or end > len(directory):
            raise self._incomplete()
        flags, method, checksum, size, name_size, extra_size, comment_size, start = _ENTRY.unpack_from(directory, place)
        rest = end + name_size
        if size == _LARGE_32 or start == _LARGE_32:
            size, start = self._large_numbers(directory[rest : rest + extra_size], size, start)
        plain = method == zipfile.ZIP_STORED and not flags & _ENCRYPTED
        return directory[end:rest], plain, checksum, size, start, rest + extra_size + comment_size - place

    def _large_numbers(self, extra: bytes, size: int, start: int) -> tuple[int, int]:
        """Return the true size and start of an entry, from its extra fields."""
        place = 0
        while place + 4 <= len(extra):
            number, length = struct.unpack_from("<2H", extra, place)
            if number == _LARGE_FIELD:
                values = list(struct.unpack_from(f"<{length // 8}Q", extra, place + 4))
                if size == _LARGE_32 and values:
                    size = values.pop(0)  # uncompressed, then compressed, which is the same
                if start == _LARGE_32 and values:
                    start = values[-1]
                return size, start
            place += 4 + length
        raise self._incomplete()

    def _search(self, key: bytes) -> Entry | None:
        directory = self._whole_directory()
        for first, end in ((self._last, len(directory)), (self._begin, self._last + _ENTRY_SIZE + len(key))):
            place = first - 1
            while (place := directory.find(key, place + 1, end)) >= 0:
                begin = place - _ENTRY_SIZE
                if begin >= self._begin and directory.startswith(b"PK\1\2", begin):
                    entry = self._entry(directory, begin)
                    if entry[0] == key:
                        self._last = begin
                        return entry
        return None

    def _bisect(self, key: bytes) -> Entry | None:
        """Return the entry of a name; None if it is not found, as in a directory that is not sorted."""
        if not self._count or self._length % self._count:
            return None
        length, low, high = self._length // self._count, 0, self._count
        while low < high:
            middle = (low + high) // 2
            block = self._at(self._start + middle * length, length)
            if not block.startswith(b"PK\1\2") or len(block) < _ENTRY_SIZE:
                return None
            entry = self._entry(block, 0)
            if entry[-1] != length:
                return None
            if entry[0] == key:
                return entry
            low, high = (middle + 1, high) if entry[0] < key else (low, middle)
        return None
