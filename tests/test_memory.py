"""The frozen tower: its dtype, the memory that loading it takes, and how it is split over processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TOWER, checkpoint_of, free_port, tiny_config, tiny_tower
from torch import multiprocessing

import train as train_program
from engine.configuration import default_config, read_config
from modules import build_model
from modules.backbones import FrozenTower, find_architecture
from modules.checkpoint import load_model_state, read_checkpoint, save_checkpoint
from modules.hashing import hash_tensors, tower_hashes
from modules.pretrained import load_strictly
from modules.side4video import Side4Video
from modules.side_network import LayerProjection
from utils.distributed import close_distributed, init_distributed
from utils.errors import CheckpointError

REPOSITORY = Path(__file__).resolve().parent.parent
HALF_TYPES = ["bfloat16", "float16"]
GIGABYTES = float(os.environ.get("SIDE4VIDEO_TEST_TOWER_GB", "2"))  # of the file in test_a_tower_of_gigabytes_...


def make_config(dtype, **choices):
    return tiny_config(backbone_dtype=dtype, **choices)


def save_tower(path, dtype=torch.float32):
    torch.save({name: tensor.to(dtype) for name, tensor in tiny_tower().vit.state_dict().items()}, path)
    return {"init": True, "weights": str(path)}


# ---------------------------------------------------------------- type


@pytest.mark.parametrize("name", HALF_TYPES)
def test_the_tower_alone_is_kept_in_the_type_and_gives_tokens_of_it(tmp_path, name):
    model = build_model(make_config(name, **save_tower(tmp_path / "tower.pt")))
    exact = build_model(make_config("float32", **save_tower(tmp_path / "tower.pt")))
    dtype, clips = getattr(torch, name), torch.randn(2, 2, 3, 32, 32)
    assert {p.dtype for p in model.backbone.parameters()} == {dtype}
    assert {p.dtype for p in model.trained.parameters()} == {torch.float32}
    for half, single in zip(model.backbone.layer_tokens(clips), exact.backbone.layer_tokens(clips), strict=True):
        assert half.dtype == dtype and single.dtype == torch.float32
        assert 0 < (half - single).norm() / single.norm() < 0.02
    logits = model(clips)
    logits.sum().backward()
    assert logits.dtype == torch.float32 and all(p.grad is not None for p in model.trained.parameters())


@pytest.mark.parametrize("name", ["float32", *HALF_TYPES])
def test_autocast_reaches_the_side_network_and_not_the_tower(name):
    model = build_model(make_config(name))
    clips = torch.randn(2, 2, 3, 32, 32)
    plain = list(model.backbone.layer_tokens(clips))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(clips)
        for tokens, alone in zip(model.backbone.layer_tokens(clips), plain, strict=True):
            assert tokens.equal(alone) and torch.is_autocast_enabled("cpu")
    assert logits.dtype == torch.bfloat16


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_projection_without_autocast_takes_tokens_of_any_type(placement):
    projection = LayerProjection(32, 64, placement)
    tokens = torch.randn(1, 2, 5, 32).half()
    assert projection(tokens).equal(projection(tokens.float()))


@pytest.mark.parametrize(
    "name, cuda, precision, expected",
    [
        ("precision", True, "bf16", torch.bfloat16),
        ("auto", True, "fp16", torch.float16),
        ("auto", True, "fp32", torch.float32),
        ("float16", False, "fp32", torch.float16),
        ("float32", True, "bf16", torch.float32),
    ],
)
def test_an_open_type_is_that_of_autocast_on_a_gpu(monkeypatch, name, cuda, precision, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    config = default_config(network={"backbone_dtype": name}, solver={"precision": precision})
    assert getattr(torch, config.network.backbone_dtype) == expected


# ---------------------------------------------------------------- proof


def test_the_proof_is_that_of_the_float32_tensors_in_the_file():
    tensors = tiny_tower().state_dict()
    exact = {name: tensor.half().float() for name, tensor in tensors.items()}
    hashes = tower_hashes(exact)
    assert hashes["tower_sha256"] == hash_tensors(exact)
    others = {name: tensor for name, tensor in exact.items() if name != "vit.pos_embed"}
    assert hashes["tower_sha256_but_positions"] == hash_tensors(others)
    assert tower_hashes({name: tensor.half() for name, tensor in tensors.items()}) == hashes


@pytest.mark.parametrize("trained_in, tested_in", [("float32", "bfloat16"), ("float16", "float32")])
@pytest.mark.parametrize("file_type", [torch.float32, torch.float16])
def test_a_checkpoint_loads_beside_the_same_file_in_another_type(tmp_path, trained_in, tested_in, file_type):
    named = save_tower(tmp_path / "tower.pt", file_type)
    save_checkpoint(tmp_path / "m.pt", checkpoint_of(build_model(make_config(trained_in, **named))))
    model = build_model(make_config(tested_in, **named))
    load_model_state(model, read_checkpoint(tmp_path / "m.pt"), "m.pt")
    assert model.backbone.dtype == getattr(torch, tested_in)

    content = torch.load(tmp_path / "tower.pt")
    content["blocks.0.mlp.fc1.weight"][0, 0] += 0.5
    torch.save(content, tmp_path / "other.pt")
    other = build_model(make_config(tested_in, init=True, weights=str(tmp_path / "other.pt")))
    with pytest.raises(CheckpointError, match="another frozen tower"):
        load_model_state(other, read_checkpoint(tmp_path / "m.pt"), "m.pt")


@pytest.mark.parametrize("trained_in, then", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_checkpoint_that_holds_the_tower_loads_and_is_written_again_in_another_type(tmp_path, trained_in, then):
    first = build_model(make_config(trained_in))
    save_checkpoint(tmp_path / "a.pt", checkpoint_of(first))
    second = build_model(make_config(then), load_tower=False)
    load_model_state(second, read_checkpoint(tmp_path / "a.pt"), "a.pt")
    for name, tensor in second.backbone.state_dict().items():
        assert tensor.equal(first.backbone.state_dict()[name].to(getattr(torch, then))), name
    save_checkpoint(tmp_path / "b.pt", checkpoint_of(second))
    third = build_model(make_config(trained_in), load_tower=False)
    load_model_state(third, read_checkpoint(tmp_path / "b.pt"), "b.pt")


# ---------------------------------------------------------------- loading

HAS_BUFFERS = {
    "ViT-B/16": False,
    "EVA02-CLIP-L-14": True,
    "EVA02-CLIP-bigE-14": True,
    "timm/vit_small_patch16_dinov3": True,
    "timm/vit_pe_core_base_patch16_224": True,
}


@pytest.mark.parametrize("arch, has_buffers", HAS_BUFFERS.items())
def test_a_tower_on_meta_has_the_buffers_of_one_with_weights(arch, has_buffers):
    name = find_architecture(arch).timm_name
    whole, empty = (FrozenTower(name, 32, {**TOWER, "patch_size": 16}, on_meta=on_meta) for on_meta in (False, True))
    assert all(p.is_meta and not p.requires_grad for p in empty.parameters())
    buffers = dict(whole.named_buffers())
    assert bool(buffers) == has_buffers
    for name, buffer in empty.named_buffers():
        assert not buffer.is_meta and buffer.dtype == buffers[name].dtype and buffer.equal(buffers[name]), name
    assert len(list(empty.buffers())) == len(buffers)

    load_strictly(empty, whole.state_dict(), "it", assign=True)
    clips = torch.randn(1, 2, 3, 32, 32)
    for ours, theirs in zip(empty.layer_tokens(clips), whole.layer_tokens(clips), strict=True):
        assert ours.equal(theirs)
    empty.convert(torch.bfloat16)
    assert all(tokens.dtype == torch.bfloat16 for tokens in empty.layer_tokens(clips))
    assert all(b.equal(buffers[name]) for name, b in empty.named_buffers())  # rope stays in float32; k_bias is 0


BIG = """
import sys, threading
from engine.configuration import default_config
from modules import build_model

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.005):
        peak[0] = max(peak[0], anonymous())

path, dtype, width, depth = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
network = {"arch": "timm/vit_base_patch16_224", "init": True, "weights": path, "backbone_dtype": dtype,
           "backbone_kwargs": {"embed_dim": width, "depth": depth, "num_heads": width // 64}}
config = default_config(network=network)
watcher = threading.Thread(target=watch, daemon=True)  # daemon: ends even if build_model fails
watcher.start()
model = build_model(config)
done.set()
watcher.join()
tower = sum(p.numel() * p.element_size() for p in model.backbone.parameters())
print(anonymous(), max(peak[0], anonymous()), tower)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_tower_of_gigabytes_loads_within_its_own_size(tmp_path):
    width = 4096
    depth = max(1, -int(-GIGABYTES * 2**30 // (12 * width**2 * 2)))
    shapes = FrozenTower(
        "vit_base_patch16_224", 32, {"embed_dim": width, "depth": depth, "num_heads": 64}, on_meta=True
    ).vit.state_dict()
    path = tmp_path / "big.pt"
    torch.save({name: torch.zeros(tensor.shape, dtype=torch.half) for name, tensor in shapes.items()}, path)
    assert path.stat().st_size >= GIGABYTES * 2**30

    def start(dtype):
        command = [sys.executable, "-c", BIG, str(path), dtype, str(width), str(depth)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)

    try:
        both = [start("bfloat16"), start("float16")]  # at the same time, like the processes of one run
        (_, converted, tower), (_, mapped, _) = (map(int, p.communicate(timeout=120)[0].split()) for p in both)
    finally:
        path.unlink()
    figures = [f"{size / 2**20:.0f} MiB" for size in (tower, converted, mapped)]
    print("tower {}; RssAnon at peak: converted {}, of the file's type {}".format(*figures))
    assert converted < 1.25 * tower
    assert mapped < 0.5 * tower  # libraries only: the tower stays in the mapped file, which all processes share


# ---------------------------------------------------------------- sharding


def train_twice(rank, config_path, folder, port):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    for shard in (False, True):
        config = read_config(config_path, [f"network.shard_backbone={shard}", "network.backbone_dtype=bfloat16"])
        train_program.train(config, f"{folder}/{shard}")

    device = init_distributed()
    torch.manual_seed(0)
    tower = build_model(config).backbone
    clips = torch.randn(1, 2, 3, 32, 32)
    expected = list(tower.layer_tokens(clips))
    total = sum(p.numel() * p.element_size() for p in tower.parameters())
    model = Side4Video(tower, None)
    model.place(device, shard_backbone=True)
    same = all(a.equal(b) for a, b in zip(tower.layer_tokens(clips), expected, strict=True))
    local = sum(p.to_local().numel() * p.to_local().element_size() for p in tower.parameters())
    torch.save({"sharded": model.sharded, "same": same, "local": local, "total": total}, f"{folder}/rank{rank}.pt")
    close_distributed()


def test_a_sharded_tower_trains_alike_and_takes_half_of_the_memory(config, tmp_path):
    multiprocessing.spawn(train_twice, (config, str(tmp_path), free_port()), nprocs=2)
    a, b = (torch.load(tmp_path / str(shard) / "last_model.pt") for shard in (False, True))
    assert hash_tensors(a["trained"]) == hash_tensors(b["trained"])
    assert hash_tensors(a["tower"]) == hash_tensors(b["tower"]) and a["tower_sha256"] == b["tower_sha256"]
    assert a["best_accuracy"] == b["best_accuracy"] >= 0
    for rank in range(2):
        result = torch.load(tmp_path / f"rank{rank}.pt")
        assert result["sharded"] and result["same"] and result["local"] <= 0.52 * result["total"], result
