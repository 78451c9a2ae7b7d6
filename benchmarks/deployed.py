"""One view on this CPU: PyTorch eager, PyTorch with compiled tower blocks, and the exported file in ONNX Runtime.

    python -m benchmarks.deployed [--threads N] [--rounds N]

All forms of a model run in turns in one process; medians. Seconds are those of the processor (time.process_time), with
one thread by default, so that other programs of the machine count little. Weights are random: they change no cost.
ONNX Runtime has no bfloat16 products on a CPU, so beside a bfloat16 tower its file computes in float32.
Writes benchmarks/results/deployed.txt.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from benchmarks.machine import describe_machine
from engine.configuration import default_config
from inference.exporting import ScoringGraph, example_clips, export
from inference.recognizer import Recognizer
from modules import build_model
from utils.precision import resolve_precision

RESULTS = Path("benchmarks/results/deployed.txt")
FRAMES, CLASSES, SIZE, SIDE_WIDTH = 8, 174, 224, 320
MODELS = [(arch, dtype) for arch in ("ViT-B/32", "ViT-B/16") for dtype in ("float32", "bfloat16")]


def recognizer_of(arch: str, backbone_dtype: str) -> Recognizer:
    """The paper's model of a tower, with random weights."""
    network = {"arch": arch, "init": False, "side_dim": SIDE_WIDTH, "backbone_dtype": backbone_dtype}
    data = {"num_segments": FRAMES, "num_classes": CLASSES, "input_size": SIZE, "resize": SIZE}
    config = default_config(network={**network, "backbone_kwargs": {}}, data=data, solver={"precision": "fp32"})
    torch.manual_seed(0)
    names = [f"class {label}" for label in range(CLASSES)]
    return Recognizer(build_model(config), config, names, resolve_precision("fp32", torch.device("cpu")))


def onnx_form(path: Path, threads: int) -> Callable[[Tensor], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda clips: session.run(None, {"clips": clips.numpy()})[0]


def torch_form(recognizer: Recognizer, compiled: bool) -> Callable[[Tensor], np.ndarray]:
    recognizer.model.place(torch.device("cpu"), compiled=compiled)
    graph = ScoringGraph(recognizer.model, recognizer.config.data).eval()
    return lambda clips: graph(clips).numpy()


@torch.inference_mode()
def measure(forms: dict[str, Callable[[Tensor], np.ndarray]], clips: Tensor, rounds: int) -> list[str]:
    """A line for each form: median seconds, the ratio to the first form, and how far its scores are from that one's."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    scores = {name: form(clips) for name, form in forms.items()}  # the first run compiles
    for number in range(rounds):
        names = list(forms)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            started = time.process_time()
            forms[name](clips)
            seconds[name].append(time.process_time() - started)
    (first, reference), *_ = scores.items()
    medians = {name: statistics.median(column) for name, column in seconds.items()}
    return [
        f"  {name:12} {medians[name]:7.3f} s, {medians[first] / medians[name]:5.2f} times as fast, scores at most "
        f"{np.abs(scores[name] - reference).max():.1e} apart"
        for name in forms
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = [describe_machine() + f", onnxruntime {onnxruntime.__version__}"]
    lines.append(
        f"one view of {FRAMES} frames, {args.threads} thread, {args.rounds} rounds in turns, processor seconds"
    )
    with tempfile.TemporaryDirectory() as folder:
        for arch, dtype in MODELS:
            file = Path(folder) / "m.onnx"
            forms = {"eager": torch_form(eager := recognizer_of(arch, dtype), compiled=False)}
            size = export(eager, file, "0" * 64).files[-1][1]
            forms["compiled"] = torch_form(recognizer_of(arch, dtype), compiled=True)
            forms["ONNX Runtime"] = onnx_form(file, args.threads)
            lines.append(f"{arch}, {dtype} tower; the .onnx file has {size / 1e6:.0f} MB")
            lines += measure(forms, example_clips(eager.config.data, 1), args.rounds)
            sys.stdout.write("\n".join(lines[-4:]) + "\n")
            sys.stdout.flush()
    RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
