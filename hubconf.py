"""The door for other programs: `torch.hub.load(REPO, "side4video", source="local", checkpoint=...)`.

REPO is a clone of this repository; nothing is installed. Its folders are called `datasets`, `utils` and so on, as
packages of other projects are, and the calling program may have such a package. So the folders have these names in
`sys.modules` only while a call of the recognizer runs. What the program itself imports is its own, before and after.
"""

import contextlib
import functools
import importlib
import inspect
import sys
from pathlib import Path

dependencies = ["torch", "torchvision", "timm", "safetensors", "numpy", "PIL", "simplejpeg", "numba", "yaml", "dotmap"]
dependencies += ["tqdm", "av"]

ROOMS = ("utils", "datasets", "modules", "engine", "inference")


def side4video(checkpoint, **options):
    """A recognizer: its methods `predict`, `scores` and `features` and the rest of inference/recognizer.py.

    Args:
        checkpoint: file or folder of a trained model, or `org/name` of the Hugging Face Hub.
        options: those of `Recognizer.load`: config, weights, device, precision, workers, overrides.
    """
    rooms = Rooms()
    with rooms.in_place():
        recognizer = importlib.import_module("inference").Recognizer.load(checkpoint, **options)
    return Apart(recognizer, rooms)


class Rooms:
    """The modules of this repository, which have their names only inside `in_place`. Not for several threads."""

    def __init__(self):
        self._own = {}
        self._inside = False

    @contextlib.contextmanager
    def in_place(self):
        if self._inside:  # a method that calls another
            yield
            return
        others, path, self._inside = _take(), list(sys.path), True
        sys.modules.update(self._own)
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        try:
            yield
        finally:
            self._own = _take()
            sys.modules.update(others)
            sys.path[:] = path
            self._inside = False


class Apart:
    """An object whose methods, and the iterators that they return, run with its rooms in place."""

    def __init__(self, target, rooms):
        self._target = target
        self._rooms = rooms

    def __getattr__(self, name):
        value = getattr(self._target, name)
        return self._apart(value) if inspect.ismethod(value) else value

    def _apart(self, method):
        @functools.wraps(method)
        def call(*args, **kwargs):
            with self._rooms.in_place():
                result = method(*args, **kwargs)
            return self._steps(result) if inspect.isgenerator(result) else result

        return call

    def _steps(self, iterator):
        nothing = object()
        while True:
            with self._rooms.in_place():
                value = next(iterator, nothing)
            if value is nothing:
                return
            yield value


def _take():
    """Remove every module with the name of a room, or below it, from `sys.modules`, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in ROOMS]
    return {name: sys.modules.pop(name) for name in names}
