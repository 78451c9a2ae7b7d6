"""The frame files of one video: in a folder, or packed in one uncompressed zip file.

`open_frames(path)` finds out which of the two exists: the folder `path`, otherwise the file `path.zip`.
"""

import os
import struct
import zipfile
import zlib
from typing import BinaryIO, Protocol

from utils.errors import DataError

SUFFIX = ".zip"
_END = struct.Struct("<4s4H2LH")  # the record at the end of a zip file
_ENTRY = struct.Struct("<4s6H3L5H2L")  # an entry of the directory; its name follows
_LOCAL = struct.Struct("<4s5H3L2H")  # the header before the content of a file; its name and extra bytes follow
_ENCRYPTED, _LARGE = 1, 0xFFFFFFFF


class Frames(Protocol):
    """The frame files of one video; a context manager."""

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises FileNotFoundError if there is none of this name."""

    def names(self) -> list[str]:
        """Return the names of all files."""

    def __enter__(self) -> "Frames": ...

    def __exit__(self, *error: object) -> None: ...


def open_frames(path: str) -> Frames:
    """Return the frames of the folder `path`, or of the zip file `path.zip` if there is no such folder."""
    if not os.path.isdir(path) and os.path.isfile(path + SUFFIX):
        return FrameArchive(path + SUFFIX)
    return FrameFolder(path)


class FrameFolder:
    """Frame files in a folder."""

    def __init__(self, path: str):
        self.path = path

    def read(self, name: str) -> bytes:
        with open(os.path.join(self.path, name), "rb") as file:
            return file.read()

    def names(self) -> list[str]:
        return os.listdir(self.path) if os.path.isdir(self.path) else []

    def __enter__(self) -> "FrameFolder":
        return self

    def __exit__(self, *error: object) -> None:
        pass


class FrameArchive:
    """Frame files in a zip file without compression.

    Python's zipfile makes an object for every entry of the directory, which takes longer than reading a few frames. So
    the directory is read as one block of bytes, and a name is searched in it.
    """

    def __init__(self, path: str):
        """Raises DataError if the file is no zip file."""
        self.path = path
        self._file: BinaryIO = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by __exit__
        try:
            self._directory = self._read_directory()
        except BaseException:
            self._file.close()
            raise

    def _read_directory(self) -> bytes:
        size = self._file.seek(0, os.SEEK_END)
        if size >= _END.size:
            mark, *_, count, length, start, _ = _END.unpack(self._at(size - _END.size, _END.size))
            if mark == b"PK\5\6" and count < 0xFFFF and start + length == size - _END.size:
                return self._at(start, length)
        raise DataError(f"{self.path}: no complete zip file of frames; pack it again with tools/prepare_data.py pack")

    def _at(self, place: int, length: int) -> bytes:
        self._file.seek(place)
        return self._file.read(length)

    def read(self, name: str) -> bytes:
        """Raises DataError if the file is compressed, or if its content does not have the stated checksum."""
        key, place = name.encode(), -1
        while (place := self._directory.find(key, place + 1)) >= 0:
            entry = place - _ENTRY.size
            if entry >= 0 and self._directory.startswith(b"PK\1\2", entry):
                fields = _ENTRY.unpack_from(self._directory, entry)
                if fields[10] == len(key):
                    return self._content(name, fields)
        raise FileNotFoundError(name)

    def _content(self, name: str, fields: tuple) -> bytes:
        _, _, _, flags, method, _, _, checksum, size, _, length, _, _, _, _, _, start = fields
        if method != zipfile.ZIP_STORED or flags & _ENCRYPTED or _LARGE in (size, start):
            raise DataError(f"{self.path}: {name} is compressed, encrypted or too large; pack the frames again")
        block = self._at(start, _LOCAL.size + length + size)
        extra = _LOCAL.unpack_from(block)[-1] if len(block) >= _LOCAL.size else 0
        if extra:
            block = self._at(start, _LOCAL.size + length + extra + size)
        content = block[_LOCAL.size + length + extra :]
        if len(content) != size or zlib.crc32(content) != checksum:
            raise DataError(f"{self.path}: {name} is damaged; pack the frames again")
        return content

    def names(self) -> list[str]:
        found, place = [], 0
        while place < len(self._directory):
            fields = _ENTRY.unpack_from(self._directory, place)
            start = place + _ENTRY.size
            found.append(self._directory[start : start + fields[10]].decode(errors="surrogateescape"))
            place = start + fields[10] + fields[11] + fields[12]
        return found

    def __enter__(self) -> "FrameArchive":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
