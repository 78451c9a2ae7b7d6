"""Read TorchScript archives, the form in which OpenAI publishes CLIP, without running or compiling their code.

Such an archive is a zip file with one folder. In it, `data.pkl` is a pickled tree of modules, `data/<key>` holds the
bytes of one storage, and `code/` what `torch.jit.load` would compile. Each class or function name that the pickle may
use is mapped here to a class that does nothing, so unpickling only describes the tree. The tensors are read afterwards.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

LONGEST_PICKLE = 256 * 2**20  # bytes; the tensors lie beside it


class ScriptObject:
    """A module of the archive with its attributes, or a typed list, of which the content is not needed."""

    attributes: dict[str, Any] = {}

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class StorageView(NamedTuple):
    """A tensor as a strided view: the arguments of `_rebuild_tensor_v2`, with offset and strides in elements."""

    storage: tuple[str, torch.dtype, str, str, int]  # "storage", type, key, device, number of elements
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    backward_hooks: dict


ALLOWED_NAMES = {
    "torch._utils._rebuild_tensor_v2": StorageView,
    "collections.OrderedDict": dict,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.BoolStorage": torch.bool,
    "torch.jit._pickle.build_intlist": ScriptObject,
    "torch.jit._pickle.build_doublelist": ScriptObject,
    "torch.jit._pickle.build_boollist": ScriptObject,
    "torch.jit._pickle.build_tensorlist": ScriptObject,
    "torch.jit._pickle.restore_type_tag": ScriptObject,
}


class ArchiveUnpickler(pickle.Unpickler):
    """Unpickles a tree of ScriptObject and StorageView."""

    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name.startswith("__torch__."):
            return ScriptObject
        if full_name not in ALLOWED_NAMES:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {full_name}")
        return ALLOWED_NAMES[full_name]

    def persistent_load(self, storage: Any) -> Any:
        return storage


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive. Files of torch.save are zip files too, but without constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return find_folder(archive) is not None
    except (zipfile.BadZipFile, OSError):
        return False


def find_folder(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the folder in a TorchScript archive, None for other zip files."""
    folders = (name.split("/")[0] for name in archive.namelist() if name.endswith("/constants.pkl"))
    return next(folders, None)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a TorchScript archive, by dotted name: those of `torch.jit.load(path).state_dict()`.

    Raises:
        pickle.UnpicklingError: the archive uses a class or function that is not allowed.
        Exception: the archive is damaged; zipfile, pickle and torch raise many types.
    """
    with zipfile.ZipFile(path) as archive:
        folder = find_folder(archive)
        with archive.open(f"{folder}/data.pkl") as file:
            root = ArchiveUnpickler(file).load()
        storages: dict[str, Tensor] = {}
        tensors = {}
        for name, view in named_views(root):
            _, dtype, key, *_ = view.storage
            if key not in storages:
                content = bytearray(archive.read(f"{folder}/data/{key}"))
                empty = torch.empty(0, dtype=torch.uint8)
                storages[key] = torch.frombuffer(content, dtype=torch.uint8) if content else empty
            tensors[name] = storages[key].view(dtype).as_strided(view.size, view.stride, view.offset)
    return tensors


def named_views(value: Any, name: str = "") -> Iterator[tuple[str, StorageView]]:
    """Yield (dotted name, view) of every tensor in the tree."""
    if isinstance(value, StorageView):
        yield name, value
    elif isinstance(value, ScriptObject):
        for attribute, child in value.attributes.items():
            yield from named_views(child, f"{name}.{attribute}" if name else attribute)


def check_archive(path: Path) -> None:
    """Check every byte that a file of torch.save or a TorchScript archive holds by the CRCs of its zip.

    torch does not look at them, and takes the bytes of a compressed entry for a tensor. Other files are left alone.

    Raises:
        ValueError: an entry is damaged or compressed.
        zipfile.BadZipFile: the zip itself is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            holds_tensors = "/data/" in entry.filename or entry.filename.endswith(".pkl")  # code may be compressed
            if entry.compress_type != zipfile.ZIP_STORED and holds_tensors:
                raise ValueError(f"entry {entry.filename} is compressed, as by a zip program; write it with torch.save")
            if entry.filename.endswith(".pkl") and entry.file_size > LONGEST_PICKLE:
                raise ValueError(f"entry {entry.filename} has {entry.file_size} bytes, too many for names and shapes")
            if holds_tensors and entry.file_size != entry.compress_size:
                raise ValueError(f"entry {entry.filename} states two sizes; it is damaged")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"entry {damaged} is damaged (CRC)")
