"""TorchScript archives, the form in which OpenAI publishes CLIP, read as data: none of their code is run or compiled.

Such an archive is a zip of one folder. Its `data.pkl` is a pickled tree of modules, `data/<key>` holds the bytes of one
storage, `code/` what `torch.jit.load` would compile. Every name that the pickle may ask for stands here for something
inert, so that unpickling yields a description of the tree; the tensors are read afterwards.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class ScriptObject:
    """A module of the archive with its attributes; also a typed list, whose content nothing here needs."""

    attributes: dict[str, Any] = {}

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class StorageView(NamedTuple):
    """What `_rebuild_tensor_v2` is called with: a tensor as a strided view, offset and strides in elements."""

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
    """Whether a file is a TorchScript archive; a torch.save file is a zip too, but one without constants.pkl."""
    try:
        with zipfile.ZipFile(path) as archive:
            return find_folder(archive) is not None
    except (zipfile.BadZipFile, OSError):
        return False


def find_folder(archive: zipfile.ZipFile) -> str | None:
    """The name of the one folder of a TorchScript archive, None in another zip."""
    folders = (name.split("/")[0] for name in archive.namelist() if name.endswith("/constants.pkl"))
    return next(folders, None)


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive under their dotted names, as `torch.jit.load(path).state_dict()` gives them.

    Raises:
        pickle.UnpicklingError: the archive asks for a name that tensors do not need.
        Exception: of many kinds, from zipfile, pickle and torch, when the archive is damaged.
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
    """(dotted name, view) of every tensor in the tree."""
    if isinstance(value, StorageView):
        yield name, value
    elif isinstance(value, ScriptObject):
        for attribute, child in value.attributes.items():
            yield from named_views(child, f"{name}.{attribute}" if name else attribute)
