"""Files that are either complete or absent: write to a temporary file, then rename."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

from utils.errors import DataError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], temporary: Path | None = None) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it to `path`.

    A reader sees the old file or the new one, never a part. Missing folders are created. If `write` raises, the old
    file stays and the temporary file is removed.

    Args:
        temporary: the temporary file, on the same disk, which is overwritten; None: a new one. With a name that the
            next attempt uses again, a killed process leaves nothing behind for good.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if temporary is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
    try:
        with open(temporary, "wb") as file:
            write(file)
        with open(temporary, "rb") as file:  # opened again: safetensors replaces the file instead of writing into it
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Call `fill(folder)` on an empty folder beside `path`, then rename it to `path`. Missing parents are created.

    Raises:
        DataError: `path` is a file or a folder that is not empty, or cannot be written; nothing is left behind.
    """
    check_folder(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            fill(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as content:
                        os.fsync(content.fileno())
            os.chmod(temporary, 0o755)
            os.rename(temporary, path)  # it replaces an empty folder, and fails on any other
            _sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def check_folder(path: Path) -> None:
    """Raise DataError unless `path` is free or an empty folder."""
    if path.exists() and not path.is_dir():
        raise DataError(f"{path}: is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()):
        raise DataError(f"{path}: holds files already and is not overwritten; name another folder")


def _sync_folder(folder: Path) -> None:
    """Bring the new name to the disk: without this, a crash of the machine can undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # some network file systems cannot do that for a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def probe(path: Path) -> None:
    """Make sure, before any work, that the file `path` can be written. Nothing is left behind.

    Raises:
        DataError: it is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise DataError(f"{path}: cannot be written: it is a folder; give the name of a file")
    with writing(path):
        made = [folder for folder in [path.parent, *path.parent.parents] if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        for folder in made:
            folder.rmdir()


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises DataError if it cannot be written."""
    with writing(path):
        write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, content: object) -> None:
    """Write an indented JSON file atomically. Raises DataError if it cannot be written.

    A byte of a file name that is not UTF-8 becomes an escape, from which `json.load` gives the same name.
    """
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_text(path, text.encode(errors="backslashreplace").decode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError of the `with` block again as a DataError that names `path`."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_together(paths: Sequence[Path], write: Callable[[Path], object]) -> None:
    """Call `write(folder)` on a new folder beside the paths, then move the files that it made there to the paths.

    Each of `paths` that is in that folder, under its own name, is moved; a file of another name stays behind and is
    removed with the folder. Old files of all paths are removed before the first one is moved, so a reader never meets
    new files beside old ones. If `write` raises, the old files stay.

    Args:
        paths: all in one folder, which is made if it is missing.

    Raises:
        DataError: a file cannot be written.
    """
    folder = paths[0].parent
    with writing(paths[0]):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=f".{paths[0].name}.")
    with temporary as name, writing(paths[0]):
        write(Path(name))
        for path in paths:
            path.unlink(missing_ok=True)
        for path in paths:
            if (made := Path(name) / path.name).exists():
                with open(made, "rb") as file:
                    os.fsync(file.fileno())
                os.chmod(made, 0o644)
                os.replace(made, path)
        _sync_folder(folder)
