"""Windows a second of a stream, where each frame goes through the tower once, against each window scored alone.

    python -m benchmarks.streaming [--threads N] [--rounds N]

Both score the same windows in turns in one process, stride one frame of a window of 8; medians. Seconds are those of
the processor (time.process_time), with one thread by default, so that other programs of the machine count little.
Weights are random: they change no cost. For the large towers, which take too long here, products are counted instead.
Writes benchmarks/results/streaming.txt.
"""

import argparse
import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import describe_machine, keep_lines
from datasets.transforms import normalize_clips
from engine.configuration import default_config
from engine.loops import view_scores
from inference.recognizer import Recognizer
from modules import build_model
from modules.backbones import FrozenTower, find_architecture
from modules.side_network import SideNetwork
from utils.precision import resolve_precision

RESULTS = Path("benchmarks/results/streaming.txt")
FRAMES, CLASSES, SIZE = 8, 174, 224
MEASURED = (("ViT-B/16", 320, "fp32"), ("ViT-B/16", 320, "bf16"), ("ViT-B/32", 320, "fp32"))
COUNTED = (
    ("ViT-B/16", 320, "all"),
    ("ViT-L/14", 512, "all"),
    ("EVA02-CLIP-L-14", 512, "every2"),
    ("EVA02-CLIP-bigE-14", 576, "every2"),
)


def recognizer_of(arch: str, side_width: int, precision: str) -> Recognizer:
    """The paper's model of a tower, with random weights."""
    network = {"arch": arch, "init": False, "side_dim": side_width, "backbone_kwargs": {}}
    data = {"num_segments": FRAMES, "num_classes": CLASSES, "input_size": SIZE, "resize": SIZE}
    config = default_config(network=network, data=data, solver={"precision": precision})
    torch.manual_seed(0)
    names = [f"class {label}" for label in range(CLASSES)]
    return Recognizer(build_model(config), config, names, resolve_precision(precision, torch.device("cpu")))


def measure(arch: str, side_width: int, precision: str, rounds: int) -> str:
    """One line: both rates, the ratio of the medians, and how far the scores are apart."""
    recognizer = recognizer_of(arch, side_width, precision)
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(FRAMES + rounds + 1)]
    stream = recognizer.stream(frames, window=float(FRAMES), rate=1.0)
    seconds, apart = [], 0.0
    for number in range(rounds + 1):
        started = time.process_time()
        scores = next(stream).scores
        streamed = time.process_time() - started
        started = time.process_time()
        expected = scores_alone(recognizer, frames[number : number + FRAMES])
        seconds.append((streamed, time.process_time() - started))
        apart = max(apart, float(np.abs(scores - expected).max()))
    ours, alone = (statistics.median(column) for column in zip(*seconds[1:], strict=True))  # the first fills the ring
    return (
        f"{arch}, stride 1 of {FRAMES}: {1 / ours:.2f} windows/s, alone {1 / alone:.2f}, ratio {alone / ours:.2f}, "
        f"scores at most {apart:.1e} apart ({precision})"
    )


@torch.no_grad()
def scores_alone(recognizer: Recognizer, frames: list[np.ndarray]) -> np.ndarray:
    """One window by the model's own forward pass. The frames have the size of the input: there is nothing to crop."""
    data = recognizer.config.data
    clip = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].contiguous()
    with recognizer.precision.autocast():
        logits = recognizer.model(normalize_clips(clip, tuple(data.mean), tuple(data.std)))
    return view_scores(logits[:, None])[0].numpy()


def count(arch: str, side_width: int, side_layers: str) -> str:
    """One line: the products of a window alone and of a window of a stream, counted without computing them."""

    @torch.no_grad()
    def per_frame(frames: int) -> tuple[float, list[torch.Tensor]]:
        with FlopCounterMode(display=False) as counter:
            clips = torch.zeros(1, frames, 3, SIZE, SIZE)
            products, projected = side.frame_parts(clips, tower.layer_tokens(clips))
            parts = [products, *projected]
        return counter.get_total_flops() / 2e9, parts

    tower = FrozenTower(find_architecture(arch).timm_name, SIZE, side_layers=side_layers, on_meta=True)
    sizes = (tower.width, side_width, len(tower.layers), tower.patch_size, tower.num_patches)
    # Shapes only: no memory, no time. The plain form of attention, because not every fast one is counted.
    with FakeTensorMode() as fake, sdpa_kernel(SDPBackend.MATH):
        for module in tower.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape), requires_grad=False))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, fake.from_tensor(buffer))
        side = SideNetwork(*sizes, find_architecture(arch).side_variant).eval()
        (one, _), (all_frames, parts) = per_frame(1), per_frame(FRAMES)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            side.mix_frames(parts[0], parts[1:])
    mix = counter.get_total_flops() / 2e9
    return (
        f"{arch}, side width {side_width}, arithmetic: a frame {one:.0f} G products, what mixes {FRAMES} frames "
        f"{mix:.0f} G; ratio {(all_frames + mix) / (one + mix):.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    head = f"{describe_machine()}\n{args.threads} thread, {args.rounds} rounds, processor seconds"
    measured = (measure(*tower, args.rounds) for tower in MEASURED)
    keep_lines(itertools.chain([head], measured, (count(*tower) for tower in COUNTED)), RESULTS)


if __name__ == "__main__":
    main()
