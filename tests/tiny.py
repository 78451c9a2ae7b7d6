"""Builders that several tests share: tiny towers, configurations, clips, videos, and the programs as functions."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import test as test_program
import train as train_program
from benchmarks import plain_pipeline
from datasets.annotations import read_class_names
from datasets.transforms import EvalTransform, TrainTransform, protocol_resize
from engine.configuration import default_config, read_config
from engine.loops import train_one_epoch
from engine.optim import build_optimizer
from modules import build_model
from modules.backbones import FrozenTower, find_architecture
from modules.checkpoint import checkpoint_state, model_state, save_checkpoint, save_safetensors
from modules.side4video import Side4Video, SideClassifier
from modules.side_network import FrameAttention, SideNetwork
from utils.precision import resolve_precision


def free_port() -> str:
    """A port of this machine that nobody uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def train_transform(protocol, input_size, flip_labels, rand_aug=False, resize=None):
    """A TrainTransform whose resize is the protocol's unless given."""
    return TrainTransform(protocol, input_size, resize or protocol_resize(protocol, input_size), flip_labels, rand_aug)


def eval_transform(protocol, input_size, num_crops=1, resize=None):
    """An EvalTransform whose resize is the protocol's unless given."""
    return EvalTransform(input_size, resize or protocol_resize(protocol, input_size), num_crops)


def random_frame(seed: Sequence[int], size: tuple[int, int]) -> Image.Image:
    """A smooth random RGB image of (width, height), another one for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, size=(6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


TOWER = {"embed_dim": 32, "depth": 3, "num_heads": 2}


def tiny_tower(arch="ViT-B/16", **kwargs):
    torch.manual_seed(0)
    return FrozenTower(find_architecture(arch).timm_name, 32, {**TOWER, **kwargs})


def tiny_config(arch="ViT-B/16", init=False, weights=None, backbone_dtype="auto", **kwargs):
    """A resolved configuration of a tower of three blocks of width 32; `kwargs` are timm's."""
    network = {"arch": arch, "init": init, "weights": weights, "backbone_dtype": backbone_dtype}
    return default_config(network={**network, "backbone_kwargs": {**TOWER, **kwargs}})


def checkpoint_of(model):
    """The entries of a checkpoint of this project, with no configuration and one finished epoch."""
    return checkpoint_state(model_state(model), model.trained.state_dict(), {}, None, epoch=1)


def published_form(tower, dtype=torch.float32):
    """The tower's tensors as OpenAI names them, with final norm, projection and a text tower around them."""
    swaps = [
        ("patch_embed.proj", "conv1"),
        ("norm_pre", "ln_pre"),
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("norm1", "ln_1"),
        ("norm2", "ln_2"),
        ("blocks.", "transformer.resblocks."),
        ("pos_embed", "positional_embedding"),
        ("cls_token", "class_embedding"),
    ]
    state = {}
    for name, tensor in tower.vit.state_dict().items():
        for ours, theirs in swaps:
            name = name.replace(ours, theirs)
        tensor = tensor.squeeze() if name in ("class_embedding", "positional_embedding") else tensor
        state[f"visual.{name}"] = tensor.to(dtype)
    width = tower.width
    state |= {"visual.ln_post.weight": torch.ones(width), "visual.ln_post.bias": torch.zeros(width)}
    state |= {"visual.proj": torch.randn(width, 16), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    return state | {"logit_scale": torch.tensor(1.0), "input_resolution": torch.tensor(32)}


CPU = torch.device("cpu")


def pixel_batch(seed, clips=4):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (clips, 2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"clips": pixels, "labels": torch.randint(0, 5, (clips,), generator=generator)}


def train_steps(batches, accumulation, network=None, **changes):
    """One epoch over `batches` from seeded weights, `changes` in the section solver; (model, mean loss)."""
    network = network or {"arch": "ViT-B/16", "backbone_kwargs": TOWER}
    solver = {"type": "multistep", "epochs": 9, "lr": 0.01, "lr_decay_step": 9, "weight_decay": 0.1}
    solver |= {"grad_accumulation_steps": accumulation, **changes}
    config = default_config(seed=0, network=network, solver=solver, logging={"print_freq": 100})
    torch.manual_seed(0)
    model = build_model(config)
    optimizer, precision = build_optimizer(model, config), resolve_precision(config.solver.precision, CPU)
    loss = train_one_epoch(model, batches, optimizer, precision.grad_scaler(), precision, 0, config)
    return model, loss


def loader_config(paths, accumulation=1, view_batch=None, **data):
    """A resolved configuration for the loaders; `paths` are root and list, of training and of validation."""
    root, list_path = paths
    places = {"train_root": root, "train_list": list_path, "val_root": root, "val_list": list_path}
    data = {"batch_size": 2, "num_classes": 4, "decoder": "decord", "input_size": 16, **places, **data}
    solver = {"grad_accumulation_steps": accumulation}
    return default_config(seed=11, data=data, solver=solver, test={"view_batch": view_batch})


def epoch_batches(loader, epoch):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_equal_batches(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() >= {"clips", "labels", "indices"}
        assert all(torch.equal(batch[name], other[name]) for name in batch)


def make_frames(count, size=(53, 38)):
    return [np.array(random_frame((7, number), size)) for number in range(count)]


def train_clip(transform, frames, label, rng):
    """The augmented clip, uint8 (T, 3, H, W), and its label."""
    clip = torch.empty(len(frames), 3, transform.input_size, transform.input_size, dtype=torch.uint8)
    return clip, transform(frames, label, rng, clip)


def plain_clip(frames, label, seed, protocol, size, flip_labels, rand_aug=False):
    """The clip of the plain pipeline, int (T, H, W, 3), and its label."""
    images = [Image.fromarray(frame) for frame in frames]
    generator = np.random.default_rng(seed)
    clip, label = plain_pipeline.train_clip(images, label, generator, protocol, size, flip_labels, rand_aug)
    return np.stack([np.asarray(image).astype(int) for image in clip]), label


def pillow_resize(image, size, filter):
    """One pass across, one down, which is Pillow's order for all sizes before version 13."""
    return image.resize((size[0], image.height), filter).resize(size, filter)


def smooth_pictures(seed: int, count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Smooth pictures, each another, uint8 (H, W, 3) of (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)) for picture in coarse]


def write_video(path: Path, seed: int = 0, count: int = 5, size: tuple[int, int] = (48, 32), angle: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for picture in smooth_pictures(seed, count, size):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    if angle:
        rotate(path, angle)


def rotate(path: Path, angle: int) -> None:
    """Write the matrix of a turn by 90 degrees into the track header of an mp4 file."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # version and flags, then times, number, length, layer, volume
    turn = {90: (0, 1, -1, 0), 270: (0, -1, 1, 0)}[angle]
    a, b, c, d = (value << 16 for value in turn)
    for offset, value in zip((0, 4, 12, 16), (a, b, c, d), strict=True):
        content[place + offset : place + offset + 4] = (value & 0xFFFFFFFF).to_bytes(4, "big")
    path.write_bytes(content)


WIDTH, HEIGHT, CELL = 96, 64, 24


FRAMES = 50


def numbered_picture(number: int, more: int = 0) -> np.ndarray:
    """A frame that carries its number below 256: eight squares, white for a set bit. It is `more` wider and higher."""
    frame = np.full((HEIGHT + more, WIDTH + more, 3), 60, dtype=np.uint8)
    for bit in range(8):
        row, column = 8 + bit // 4 * CELL, bit % 4 * CELL
        frame[row : row + CELL, column : column + CELL] = 255 * (number >> bit & 1)
    return frame


def write_packets(
    path,
    frames=FRAMES,
    codec="libx264",
    keys=12,
    b_frames=0,
    times=None,
    options=None,
    container_options=None,
    empty=0,
    more=0,
    pixel_format="yuv420p",
):
    """A video of `frames` numbers or of the pictures in it, and then of `empty` MPEG-4 packets without a picture."""
    if codec not in av.codec.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    pictures = [numbered_picture(number, more) for number in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixel_format
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = keys, b_frames
        stream.codec_context.time_base = Fraction(1, 1000)
        for index, pixels in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = times[index] if times else 40 * index, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for index in range(len(pictures), len(pictures) + empty):
            packet = av.Packet(b"\0\0\1\xb6\x50\x06")  # a frame's start code and header, which ends in "not coded"
            packet.stream, packet.time_base = stream, Fraction(1, 1000)
            packet.pts = packet.dts = 40 * index
            container.mux(packet)


def spoil_packets(path: Path, numbers: Sequence[int]) -> None:
    """Write noise behind the first twelve bytes of the packets of these numbers, in the order of the file."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, bytes(packet)) for packet in container.demux(video=0) if packet.size]
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(1)
    for number in numbers:
        place, packet = packets[number]
        place = content.index(packet, place)  # Matroska puts a header between
        content[place + 12 : place + len(packet)] = rng.bytes(len(packet) - 12)
    path.write_bytes(content)


REPOSITORY = Path(__file__).resolve().parent.parent


def train_run(config, output, *overrides):
    train_program.main(["--config", config, "--output", str(output), *overrides])
    return torch.load(Path(output) / "last_model.pt", weights_only=True)


def score_run(config, checkpoint, file, *arguments):
    test_program.main(["--config", config, "--weights", str(checkpoint), "--save_scores", str(file), *arguments])
    return np.load(file)


def save_untrained(config, path):
    """A checkpoint of the YAML file's model, with statistics that are not a new model's; returns the model."""
    config = read_config(config, purpose="model")
    torch.manual_seed(0)
    model = build_model(config)
    size = config.data.input_size
    with torch.no_grad():
        model.train()(torch.randn(4, config.data.num_segments, 3, size, size))
        model.trained.head.weight.mul_(20)  # so that scores of classes and videos differ clearly
    names = read_class_names(config.data.label_list, config.data.num_classes)
    state = checkpoint_state(model_state(model), model.trained.state_dict(), config.toDict(), names, epoch=1)
    (save_safetensors if path.suffix == ".safetensors" else save_checkpoint)(path, state)
    return model.eval()


def run_script(name, *arguments, **environment):
    """A script of scripts/, with this interpreter, without CUDA."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment}
    command = ["sh", f"scripts/{name}", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


SIDE = dict(backbone_width=48, side_width=128, num_layers=2, patch_size=4, num_patches=6)


B, T = 3, 4


def make_inputs(dtype, sizes, hw, batch=B, frames=T):
    """Clips (batch, frames, 3, *hw) and one tensor of tower tokens for each layer, from a fixed seed."""
    generator = torch.Generator().manual_seed(1)
    clips = torch.randn(batch, frames, 3, *hw, generator=generator, dtype=torch.float64)
    shape = (batch, frames, 1 + sizes["num_patches"], sizes["backbone_width"])
    tokens = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(sizes["num_layers"])]
    return clips.to(dtype), [t.to(dtype) for t in tokens]


def make_side(placement, dtype=torch.float64, **sizes):
    """A side network with norms and biases away from 1 and 0; `sizes` go to SideNetwork."""
    torch.manual_seed(0)
    side = SideNetwork(**sizes, norm_placement=placement).to(dtype)
    for module in side.modules():  # so that a forgotten scale or shift changes the result
        if isinstance(module, torch.nn.LayerNorm | torch.nn.BatchNorm1d | FrameAttention):
            for parameter in module.parameters():
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return side


def relative(a, b):
    """The largest difference, of the largest number in b."""
    return ((a - b).abs().max() / b.abs().max()).item()


SHARED_TOWER = dict(patch_size=8, embed_dim=32, depth=3, num_heads=2)


def shared_batches():
    """Two batches of four clips, in float64."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        yield 3 * torch.randn(4, 3, 3, 16, 16, generator=generator, dtype=torch.float64) + 5


def make_shared_model(placement, **choices):
    """A model in float64 for `shared_batches`, in training mode; `choices` go to SideNetwork."""
    torch.manual_seed(0)
    tower = FrozenTower("vit_tiny_patch16_224", 16, SHARED_TOWER)
    tower.convert(torch.float64)
    sizes = dict(backbone_width=32, side_width=64, num_layers=3, patch_size=8, num_patches=4)
    return Side4Video(tower, SideClassifier(make_side(placement, **sizes, **choices), 5).double()).train()
