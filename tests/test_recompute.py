"""Recomputation in the backward pass, memory that is kept for it, and what processes exchange in a training step."""

import itertools
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from textbook import textbook_of
from tiny import SHARED_TOWER, SIDE, free_port, make_inputs, make_shared_model, make_side, relative, shared_batches
from torch import multiprocessing, nn

from benchmarks.allocations import measure_memory
from benchmarks.reduced_bytes import count_reduced_bytes
from modules.backbones import FrozenTower
from modules.recompute import from_first_run, in_second_run, recomputed
from modules.side4video import Side4Video, SideClassifier
from modules.token_norm import TokenBatchNorm
from utils.distributed import close_distributed, init_distributed

REPOSITORY = Path(__file__).resolve().parents[1]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def accumulate(side, batches, dtype):
    """Return the outputs of both batches and leave the sums of their gradients."""
    outputs = []
    for clips, tokens in batches:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = side(clips, iter(tokens))
        out.float().square().sum().backward()
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_recomputing_changes_no_result(placement, dtype, token_dtype):
    """Over two accumulated batches: outputs and running statistics to the bit, gradients up to the order of sums."""
    results = []
    for recompute in (True, False):
        side = make_side(placement, torch.float32, **SIDE, recompute=recompute).train()
        batches = []
        for frames in (4, 3):
            clips, tokens = make_inputs(torch.float32, SIDE, (8, 12), frames=frames)
            batches.append((clips, [t.to(token_dtype) for t in tokens]))
        results.append((side, accumulate(side, batches, dtype)))
    (ours, outputs), (plain, expected) = results
    assert all(a.dtype == b.dtype and a.equal(b) for a, b in zip(outputs, expected, strict=True))
    for (name, a), b in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert a.equal(b), name
    assert ours.stem_bn.num_batches_tracked == 2
    largest = max(p.grad.abs().max() for p in plain.parameters())
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        scale = torch.maximum(b.grad.abs().max(), 1e-2 * largest)  # some are zero up to rounding
        assert (a.grad - b.grad).abs().max() <= TOLERANCE[dtype] * scale, name


def test_gradients_in_a_mode_that_changed_in_between_are_those_of_the_forward_pass():
    side = make_side("pre", **SIDE).train()
    clips, tokens = make_inputs(torch.float64, SIDE, (8, 12))
    grads = []
    for changed in (False, True):
        side.zero_grad()
        out = side(clips, iter(tokens))
        side.train(not changed)
        out.square().sum().backward()
        side.train()
        grads.append([p.grad.clone() for p in side.parameters()])
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))


def test_weights_that_change_before_the_backward_pass_are_an_error():
    side = make_side("pre", **SIDE).train()
    clips, tokens = make_inputs(torch.float64, SIDE, (8, 12))
    out = side(clips, iter(tokens))
    with torch.no_grad():
        side.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Draw(nn.Module):
    """Records whether a run was the second, its random number, and what another thread sees meanwhile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x):
        elsewhere = []
        thread = threading.Thread(target=lambda: elsewhere.append(in_second_run()))
        thread.start()
        thread.join()
        number = from_first_run(lambda: torch.rand(()).item())
        self.seen.append((in_second_run(), number, *elsewhere))
        return x * self.weight * number


def test_a_second_run_has_the_values_of_the_first_and_is_seen_in_its_thread_only():
    part = Draw()
    outputs = [recomputed(part, torch.ones(())) for _ in range(2)]
    for output in outputs:
        output.backward(retain_graph=True)
    outputs[0].backward()
    numbers = [output.item() for output in outputs]
    assert numbers[0] != numbers[1] and not in_second_run()
    first, second = ([(again, number, False) for number in numbers] for again in (False, True))
    assert part.seen == [*first, *second, second[0]]
    assert part.weight.grad.item() == pytest.approx(2 * numbers[0] + numbers[1])


# ---------------------------------------------------------------- memory


def memory_model(compiled, dtype=torch.float32):
    torch.manual_seed(0)
    tower = FrozenTower("vit_tiny_patch16_224", 96, dict(patch_size=8, embed_dim=192, depth=4, num_heads=3))
    tower.convert(dtype)
    if compiled:
        tower.compile_blocks()
    sizes = dict(backbone_width=192, side_width=128, num_layers=4, patch_size=8, num_patches=144)
    side = make_side("pre", torch.float32, **sizes).train()
    textbook = textbook_of(side, **sizes)
    if compiled:
        side.compile_blocks()
    return tower, side, textbook


@pytest.mark.parametrize("compiled", [False, True])
def test_the_backward_pass_keeps_the_towers_tokens_and_the_inputs_of_blocks(compiled):
    """In addition only the stem's product, the last block's output and some vectors; compiled or not."""
    tower, side, textbook = memory_model(compiled)
    clips = torch.randn(2, 4, 3, 96, 96)
    kept = {}
    for name, model in {"ours": side, "textbook": textbook}.items():
        model(clips, tower.layer_tokens(clips))  # compiles
        kept[name], _ = measure_memory(lambda model=model: model(clips, tower.layer_tokens(clips)))
    frames, stream = 2 * 4, 144 * 128 * 4
    floor = frames * 4 * (145 * 192 * 4 + stream)
    assert floor <= kept["ours"] <= floor + frames * 2 * stream + 0.03 * floor
    assert kept["ours"] < kept["textbook"] / 6


def test_tokens_are_kept_once_and_in_the_towers_type():
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        tower, side, _ = memory_model(False, dtype)
        clips = torch.randn(2, 4, 3, 96, 96)
        kept.append(measure_memory(lambda: side(clips, tower.layer_tokens(clips)))[0])  # noqa: B023
    saved = 2 * 4 * 4 * 145 * 192 * 2  # two bytes of each number
    assert kept[0] - kept[1] == pytest.approx(saved, rel=0.02)


def test_evaluation_holds_one_layer_of_tokens_at_a_time():
    side = make_side("pre", torch.float32, **{**SIDE, "num_layers": 5}).eval()
    clips, tokens = make_inputs(torch.float32, {**SIDE, "num_layers": 5}, (8, 12))
    shape, held, refs = tokens[0].shape, [], []

    def produce():
        for _ in range(5):
            made = torch.randn(shape)
            refs.append(weakref.ref(made))
            yield made
            del made
            held.append(sum(ref() is not None for ref in refs))

    with torch.no_grad():
        side(clips, produce())
    assert held == [1] * 5  # the one just used, which is also the input of the tower's next block


# ---------------------------------------------------------------- compiling


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "fp32"])
@pytest.mark.parametrize("recompute", [True, False])
def test_a_compiled_model_gives_the_same_losses(recompute, half):
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        torch._dynamo.utils.counters.clear()
        tower = FrozenTower("vit_tiny_patch16_224", 32, SHARED_TOWER)
        sizes = dict(backbone_width=32, side_width=64, num_layers=3, patch_size=8, num_patches=16)
        model = Side4Video(
            tower, SideClassifier(make_side("pre", torch.float32, recompute=recompute, **sizes), 5)
        ).train()
        model.place(torch.device("cpu"), compiled=compiled)
        assert not any("_orig_mod" in name for name in model.state_dict())
        optimizer = torch.optim.SGD(model.trained.parameters(), 0.05)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            clips = torch.randn(2 + step % 2, 4, 3, 32, 32, generator=generator)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                logits = model(clips).float()
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-2 if half else 1e-4)
    assert not torch._dynamo.utils.counters["graph_break"]  # a block is one graph, in bfloat16 too


def test_without_a_compiler_there_is_one_clear_error(tmp_path):
    program = (
        "import torch\nfrom modules.side4video import check_compiler\nfrom utils.errors import run_program\n"
        "run_program(lambda argv: check_compiler(torch.device('cpu')))"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    line = result.stderr.strip().splitlines()[-1]
    assert result.returncode and line.startswith("error: solver.compile: torch.compile does not work here ("), line
    assert "install a C++ compiler such as g++" in line and "Traceback" not in result.stderr


# ---------------------------------------------------------------- processes


def copy_grads(model):
    return {name: p.grad.clone() for name, p in model.trained.named_parameters()}


def train_shared(rank, port, folder):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    init_distributed()
    results = {}
    for placement, recompute, sync_bn in itertools.product(("pre", "post"), (True, False), (True, False)):
        model = make_shared_model(placement, recompute=recompute, sync_bn=sync_bn)
        alone = model.reduced_bytes()
        model.parallelize()
        share, labels, sent = slice(2 * rank, 2 * rank + 2), torch.arange(2 * rank, 2 * rank + 2), []
        with count_reduced_bytes(model) as count:
            for number, clips in enumerate(shared_batches()):
                before = count.total
                with model.no_sync() if number == 0 else torch.enable_grad():
                    torch.nn.functional.cross_entropy(model(clips[share]), labels).backward()
                sent.append(count.total - before)
        result = {
            "sent": sent,
            "derived": {"alone": alone, 1: model.reduced_bytes(), 2: model.reduced_bytes(2)},
            "grads": copy_grads(model),
            "buffers": {name: buffer.clone() for name, buffer in model.trained.named_buffers()},
        }
        model.zero_grad()
        with model.no_sync():
            loss = torch.nn.functional.cross_entropy(model(clips[share]), labels)
            loss.backward(retain_graph=True)
            result["once"] = copy_grads(model)
            loss.backward()
            result["twice"] = copy_grads(model)
        results[placement, recompute, sync_bn] = result
    torch.save(results, Path(folder, f"rank{rank}.pt"))
    close_distributed()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    multiprocessing.spawn(train_shared, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_synced_statistics_make_two_processes_one_with_the_double_batch(two_processes, placement, recompute):
    """The means are far from zero, so sums of squares in float32 would fail; gradients are means over four clips."""
    model = make_shared_model(placement, recompute=recompute)
    for clips in shared_batches():
        torch.nn.functional.cross_entropy(model(clips), torch.arange(4)).backward()
    largest = max(p.grad.abs().max() for p in model.trained.parameters())
    for rank in two_processes:
        result = rank[placement, recompute, True]
        for name, parameter in model.trained.named_parameters():
            assert (result["grads"][name] - parameter.grad).abs().max() < 1e-9 * largest, name
        for name, buffer in model.trained.named_buffers():
            assert relative(result["buffers"][name].double(), buffer.double()) < 1e-9, name


@pytest.mark.parametrize("sync_bn", [True, False])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_recomputing_changes_nothing_on_two_processes(two_processes, placement, sync_bn):
    for rank in two_processes:
        a, b = (rank[placement, recompute, sync_bn] for recompute in (True, False))
        assert a["sent"] == b["sent"]
        largest = max(grad.abs().max() for grad in b["grads"].values())
        for name, grad in b["grads"].items():
            assert (a["grads"][name] - grad).abs().max() < 1e-9 * largest, name
        assert all(a["buffers"][name].equal(buffer) for name, buffer in b["buffers"].items())


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("sync_bn", [True, False])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_a_second_backward_pass_through_one_graph_gives_the_same_gradients(
    two_processes, placement, recompute, sync_bn
):
    for rank in two_processes:
        result = rank[placement, recompute, sync_bn]
        largest = max(grad.abs().max() for grad in result["once"].values())
        for name, grad in result["once"].items():
            assert (result["twice"][name] - 2 * grad).abs().max() <= 1e-12 * largest, name


def test_processes_differ_without_synced_statistics(two_processes):
    a, b = (rank["pre", True, False]["buffers"]["side.stem_bn.running_mean"] for rank in two_processes)
    assert not a.equal(b)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_only_gradients_of_trained_tensors_are_sent_and_none_while_accumulating(two_processes, placement):
    model = make_shared_model(placement)
    gradients = sum(p.numel() * p.element_size() for p in model.trained.parameters())
    assert all(rank[placement, True, False]["sent"] == [0, gradients] for rank in two_processes)
    norms = [m.num_features for m in model.modules() if isinstance(m, TokenBatchNorm)]
    statistics = sum(8 * (2 * width + 1) + 8 * 2 * width for width in norms)  # forward once, backward once
    assert all(rank[placement, True, True]["sent"] == [statistics, gradients + statistics] for rank in two_processes)


def test_the_derived_bytes_of_an_update_are_those_that_are_sent(two_processes):
    for rank in two_processes:
        for result in rank.values():
            assert result["derived"] == {"alone": 0, 1: result["sent"][1], 2: sum(result["sent"])}
