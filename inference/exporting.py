"""A trained model as a file that runs without this project: an ONNX graph, or a program of torch.export.

One graph takes uint8 clips and gives scores; or two share its work as inference/stream.py does: what a frame decides
alone, and what mixes frames. inference/deployed.py runs the ONNX files, docs/deployment.md describes them.

Letters: B clips, T frames of a clip, N patches of a frame, L layers that are read, S side width, K classes,
H, W pixels.
"""

import contextlib
import copy
import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from dotmap import DotMap
from torch import Tensor, nn

from datasets.annotations import VideoRecord
from datasets.loaders import build_eval_loader, build_record_loader
from datasets.transforms import normalized, per_channel
from engine.software import git_commit
from inference.inputs import PathReader, given_videos
from inference.recognizer import Recognizer
from modules.side4video import Side4Video
from modules.token_norm import TokenBatchNorm
from utils.atomic import write_together
from utils.errors import ConfigError, DataError, UserError
from utils.version import VERSION

FORMAT = "side4video-deployed/1"
ONNX, PROGRAM = ".onnx", ".pt2"
OPSET = 20  # the oldest with Gelu
MOST_INSIDE = 2**31 - 2**27  # bytes of weights in an .onnx file; protobuf refuses 2 GB, and the graph needs room
METADATA = "metadata.json"  # of a .pt2 file
BATCHES = (1, 3)  # clips that a check runs together
TOLERANCE = 1e-4  # of scores, with float32 products on both sides
COARSE_TOLERANCE = 2e-2  # of scores, with products of 11 (float16) or 8 (bfloat16) bits on one side


class DifferenceError(UserError):
    """An exported model does not give the scores of the model."""


class ScoringGraph(nn.Module):
    """uint8 clips (B, T, 3, H, W) -> scores, float32 (B, K)."""

    def __init__(self, model: Side4Video, data: DotMap):
        super().__init__()
        self.model = model
        self.pixels = Pixels(data)

    def forward(self, clips: Tensor) -> Tensor:
        return scores_of(self.model(self.pixels(clips)))


class FrameGraph(nn.Module):
    """uint8 frames (B * T, 3, H, W) -> what each decides alone.

    That is the products of the stem, (B * T, N, 3S), and the projected tokens of the layers, (B * T, L, 1 + N, S).
    """

    def __init__(self, model: Side4Video, data: DotMap):
        super().__init__()
        self.tower, self.side = model.backbone, model.side_network("an export in two graphs")
        self.pixels = Pixels(data)

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        clips = self.pixels(frames.unsqueeze(1))
        products, projected = self.side.frame_parts(clips, self.tower.layer_tokens(clips))
        return products.squeeze(1), torch.cat(list(projected), dim=1)


class MixGraph(nn.Module):
    """Parts of the frames of clips, (B, T, ...) of FrameGraph's results -> scores, float32 (B, K)."""

    def __init__(self, model: Side4Video, data: DotMap):
        super().__init__()
        self.trained, self.side = model.trained, model.side_network("an export in two graphs")

    def forward(self, products: Tensor, tokens: Tensor) -> Tensor:
        return scores_of(self.trained.classify(self.side.mix_frames(products, tokens.unbind(2))))


class Pixels(nn.Module):
    """uint8 pixels -> normalised ones in float32."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, data: DotMap):
        super().__init__()
        for name in ("mean", "std"):
            self.register_buffer(f"pixel_{name}", per_channel(tuple(data[name]), torch.device("cpu")).clone())

    def forward(self, pixels: Tensor) -> Tensor:
        return normalized(pixels, self.pixel_mean, self.pixel_std)


def scores_of(logits: Tensor) -> Tensor:
    return logits.float().softmax(dim=-1)


class Graph(NamedTuple):
    """A graph to export: its place in a file's name, module, inputs and outputs; the first axis of each is free."""

    part: str
    module: type[nn.Module]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axis: str


WHOLE = Graph("", ScoringGraph, ("clips",), ("scores",), "batch")
FRAMES = Graph("-frames", FrameGraph, ("frames",), ("products", "tokens"), "frames")
MIX = Graph("-mix", MixGraph, ("products", "tokens"), ("scores",), "batch")


@dataclass(frozen=True)
class Difference:
    """The largest difference of a score from PyTorch's, on clips of a kind, at one batch size."""

    clips: str
    batch: int
    largest: float


@dataclass(frozen=True)
class Exported:
    """What was written: (path, bytes) of each file, and what a check found, [] without one."""

    files: list[tuple[Path, int]]
    differences: list[Difference]
    tolerance: float


def export(
    recognizer: Recognizer,
    out: Path,
    checkpoint_sha256: str,
    *,
    half: bool = False,
    split: bool = False,
    check: dict[str, Tensor] | None = None,
) -> Exported:
    """Write a model as `out`, an .onnx or .pt2 file, or with `split` as two files with -frames and -mix in their names.

    A bfloat16 tower computes in float32 in an ONNX file, with the same rounded weights: ONNX Runtime has no bfloat16
    products on a CPU.

    Args:
        recognizer: on the CPU, with the precision fp32.
        half: store weights in float16 and compute in it; BatchNorm's parameters and statistics stay in float32.
        check: compare the written files with the model, on uint8 clips (B, T, 3, H, W) by the name of their kind; B is
            at least the largest of BATCHES. The files are kept only if all scores agree.

    Raises:
        ConfigError: the name has another end, a package is missing, or the model cannot be exported.
        DifferenceError: the scores differ by more than the tolerance.
        DataError: a file cannot be written.
    """
    if recognizer.precision.name != "fp32" or recognizer.precision.device.type != "cpu":
        raise ValueError("an export needs the model on the CPU, with the precision fp32")
    kind = file_kind(out)
    needed = ("onnx", "onnxscript", *(("onnxruntime",) if check else ())) if kind == ONNX else ()
    packages = {name: import_extra(name) for name in needed}
    graphs = (FRAMES, MIX) if split else (WHOLE,)
    targets = [out.with_name(f"{out.stem}{graph.part}{kind}") for graph in graphs]
    paths = [path for target in targets for path in (data_file(target), target)]
    model = prepared(recognizer.model, onnx=kind == ONNX, half=half)
    exact = not half and (kind == PROGRAM or model.backbone.dtype == recognizer.model.backbone.dtype)
    tolerance = TOLERANCE if exact else COARSE_TOLERANCE
    differences: list[Difference] = []

    def write(folder: Path) -> None:
        made = [folder / target.name for target in targets]
        examples: tuple[Tensor, ...] = (example_clips(recognizer.config.data, 2),)
        for graph, path in zip(graphs, made, strict=True):
            if graph is FRAMES:
                examples = (examples[0].flatten(0, 1),)
            module = graph.module(model, recognizer.config.data).eval()
            facts = metadata_of(recognizer, checkpoint_sha256, graph, half, kind)
            with refusing(recognizer.config.network.arch, kind), without_gradients(module):
                results = write_graph(module, graph, examples, facts, path)
            examples = tuple(result.unflatten(0, (2, -1)) for result in results)
        if check:
            run = runner(made, packages.get("onnxruntime"))
            differences.extend(compare(run, recognizer, check))
            worst = max(differences, key=lambda difference: difference.largest)
            if not worst.largest <= tolerance:
                raise DifferenceError(
                    f"{out}: not written: scores differ from PyTorch's by {worst.largest:.1e} on a {worst.clips} clip "
                    f"in a batch of {worst.batch}, more than {tolerance:g}"
                )

    write_together(paths, write)
    return Exported([(path, path.stat().st_size) for path in paths if path.exists()], differences, tolerance)


def file_kind(out: Path) -> str:
    """The end of the name of an exported file. Raises ConfigError for another one."""
    if out.suffix not in (ONNX, PROGRAM):
        raise ConfigError(f"{out}: must be called *{ONNX} or *{PROGRAM}")
    return out.suffix


def data_file(path: Path) -> Path:
    """The file with the weights of an .onnx file that is too large to hold them."""
    return path.with_name(f"{path.name}.data")


def import_extra(name: str) -> ModuleType:
    """Raises ConfigError if a package of requirements-extras.txt is missing, or does not work."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of the package is missing
        raise ConfigError(
            f"ONNX files need {name}, which cannot be imported ({error}); run python -m pip install -r "
            "requirements-extras.txt, or write a .pt2 file"
        ) from error


def prepared(model: Side4Video, onnx: bool, half: bool) -> Side4Video:
    """The model in the types that it is exported in; itself if nothing changes, else a copy."""
    tower = torch.float16 if half else torch.float32 if onnx else model.backbone.dtype
    if tower == model.backbone.dtype and not half:
        return model
    model = copy.deepcopy(model)
    model.backbone.convert(tower)
    if half:
        model.trained.half()
        for module in model.trained.modules():
            if isinstance(module, TokenBatchNorm):
                module.float()  # running variances can be beyond float16
    return model


def example_clips(data: DotMap, clips: int, seed: int = 0) -> Tensor:
    """Random pixels, uint8 (clips, T, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (clips, data.num_segments, 3, data.input_size, data.input_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def metadata_of(recognizer: Recognizer, checkpoint_sha256: str, graph: Graph, half: bool, kind: str) -> dict[str, str]:
    """What a user of the file must know, as text: numbers, lists and mappings as JSON."""
    data, network = recognizer.config.data, recognizer.config.network
    versions = {"side4video": VERSION, "commit": git_commit(), "torch": torch.__version__, "timm": timm.__version__}
    if kind == ONNX:
        versions |= {name: import_extra(name).__version__ for name in ("onnx", "onnxscript")}
    resize = data.resize if isinstance(data.resize, int) else list(data.resize)
    pixels = {"size": data.input_size, "resize": resize, "mean": list(data.mean), "std": list(data.std)}
    facts = {
        "format": FORMAT,
        "graph": graph.part.removeprefix("-") or "whole",
        "frames": data.num_segments,
        "protocol": data.protocol,
        "dense": bool(data.dense),
        "pixels": pixels,
        "class_names": recognizer.class_names,
        "arch": network.arch,
        "precision": "float16" if half else "float32",
        "checkpoint_sha256": checkpoint_sha256,
        "versions": versions,
    }
    if kind == ONNX:
        facts["opset"] = OPSET
    return {name: fact if isinstance(fact, str) else json.dumps(fact) for name, fact in facts.items()}


@contextlib.contextmanager
def refusing(arch: str, kind: str) -> Iterator[None]:
    """Turn what the exporters raise, which is of many types, into a ConfigError of one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"network.arch: {arch} cannot be exported as {kind} ({reason[:200]})") from error


@contextlib.contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """A program of torch.export keeps which of its parameters want gradients; none does inside."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@torch.no_grad()
def write_graph(
    module: nn.Module, graph: Graph, examples: tuple[Tensor, ...], facts: dict[str, str], path: Path
) -> tuple[Tensor, ...]:
    """Export a module to a file, and return what it gives for the examples."""
    with quiet():
        shapes = tuple({0: torch.export.Dim(graph.axis)} for _ in graph.inputs)
        program = torch.export.export(module, examples, dynamic_shapes=shapes)
        program = program.run_decompositions({})  # resolves regions of autocast, with which a file cannot be loaded
        for node in program.graph.nodes:  # as in `simplify`
            node.meta.pop("stack_trace", None)
        if path.suffix == PROGRAM:
            torch.export.save(program, path, extra_files={METADATA: json.dumps(facts, indent=1)})
        else:
            onnx = torch.onnx.export(
                program,
                input_names=graph.inputs,
                output_names=graph.outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
            assert onnx is not None
            simplify(onnx.model)
            onnx.model.metadata_props.update(facts)
            onnx.model.producer_name, onnx.model.producer_version = "side4video", VERSION
            save_onnx(onnx.model, path)
    results = module(*examples)
    return results if isinstance(results, tuple) else (results,)


def simplify(model: Any) -> None:
    """Compute what is constant in an ONNX model of onnx_ir.

    The exporter's own optimizer also looks for patterns, which takes minutes for a tower of twelve blocks. ONNX Runtime
    finds them when it loads the file, and runs as fast (benchmarks/deployed.py).
    """
    optimizer = importlib.import_module("onnxscript.optimizer")
    optimizer.inline(model)
    optimizer.fold_constants(model)
    optimizer.remove_unused_nodes(model)
    importlib.import_module("onnx_ir.passes.common").NameFixPass()(model)
    for node in model.graph:
        node.metadata_props.clear()  # paths of this machine, and lines of code


def save_onnx(model: Any, path: Path) -> None:
    """Write an ONNX model of onnx_ir; weights above MOST_INSIDE bytes go to `data_file(path)`."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    outside = data_file(path).name if size > MOST_INSIDE else None
    importlib.import_module("onnx_ir").save(model, path, external_data=outside)  # onnxscript needs it


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the exporters, which are about their own insides."""
    logger = logging.getLogger("onnxscript")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def runner(paths: Sequence[Path], runtime: ModuleType | None) -> Callable[[Tensor], np.ndarray]:
    """uint8 clips (B, T, 3, H, W) -> scores, float32 (B, K), by one exported file, or by two that share the work.

    Args:
        runtime: the package onnxruntime, for .onnx files.
    """
    parts = [program_of(path) if runtime is None else session_of(path, runtime) for path in paths]

    def run(clips: Tensor) -> np.ndarray:
        if len(parts) == 1:
            return parts[0](clips)[0].numpy()
        frames, mix = parts
        results = frames(clips.flatten(0, 1))
        return mix(*(result.unflatten(0, clips.shape[:2]) for result in results))[0].numpy()

    return run


def program_of(path: Path) -> Callable[..., list[Tensor]]:
    with quiet():
        module = torch.export.load(path).module()

    def run(*inputs: Tensor) -> list[Tensor]:
        results = module(*inputs)
        return list(results) if isinstance(results, tuple) else [results]

    return run


def session_of(path: Path, runtime: ModuleType) -> Callable[..., list[Tensor]]:
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # it warns of constants that it does not fold
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has an exception type for each status, without a common base
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path.name}: ONNX Runtime cannot load it ({reason[:300]})") from error
    names = [put.name for put in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(result) for result in session.run(None, given)]

    return run


@torch.no_grad()
def compare(
    run: Callable[[Tensor], np.ndarray], recognizer: Recognizer, check: dict[str, Tensor]
) -> Iterator[Difference]:
    """The differences from the model itself, for each kind of clips at each of BATCHES."""
    plain = ScoringGraph(recognizer.model, recognizer.config.data).eval()
    for kind, clips in check.items():
        for batch in BATCHES:
            expected = plain(clips[:batch]).numpy()
            yield Difference(kind, batch, float(np.abs(run(clips[:batch]) - expected).max()))


def real_clips(recognizer: Recognizer, video: str | Path | None = None) -> Tensor:
    """Clips of one video, uint8 (max(BATCHES), T, 3, H, W), as a test of the model reads them.

    Args:
        video: a video file, or frames in a folder or zip file; None: the first one of `data.val_list` that can be read.

    Raises:
        DataError: the video, or the list, cannot be read.
    """
    config, clips = recognizer.config, max(BATCHES)
    if video is None:
        if not config.data.val_list:
            raise DataError("data.val_list: the configuration names no list")
        loader = build_eval_loader(config, clips=clips, unlabelled=True, every_video=True)
    else:
        records: list[VideoRecord] = given_videos([video])
        loader = build_record_loader(config, records, PathReader(config.data), clips=clips)
    for batch in loader:
        if len(batch["indices"]):
            return batch["clips"][:clips]
    raise DataError(loader.unreadable[0][1])
