"""Weight files of every form: TorchScript archives, torch.save and .safetensors files, damaged and hostile ones."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from tiny import published_form, tiny_tower
from torch import nn

from modules.backbones import find_architecture
from modules.hashing import hash_tensors
from modules.pretrained import load_tower_weights, read_state_dict
from utils.errors import CheckpointError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, 2, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        layers = {"c_fc": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "c_proj": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.Sequential(*[Block(width) for _ in range(layers)])

    def forward(self, x):
        return self.resblocks(x)


class Visual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(5, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, 3)
        self.proj = nn.Parameter(torch.randn(width, 16))

    def forward(self, images):
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        return self.ln_post(self.transformer(self.ln_pre(tokens + self.positional_embedding)))[:, 0] @ self.proj


class SmallClip(nn.Module):
    """The tensors of `tiny_tower` under OpenAI's names, and a text tower."""

    def __init__(self):
        super().__init__()
        self.visual = Visual(32)
        self.transformer = Transformer(8, 1)
        self.token_embedding = nn.Embedding(9, 8)
        self.positional_embedding = nn.Parameter(torch.randn(4, 8))
        self.ln_final = nn.LayerNorm(8)
        self.text_projection = nn.Parameter(torch.randn(8, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        for name, number in (("input_resolution", 32), ("context_length", 4), ("vocab_size", 9)):
            self.register_buffer(name, torch.tensor(number))

    def forward(self, images, text):
        words = self.transformer(self.token_embedding(text) + self.positional_embedding)
        return self.visual(images) @ (self.ln_final(words)[:, -1] @ self.text_projection).T * self.logit_scale.exp()


class Buffers(nn.Module):
    """Tensors that are hard to store: views of one storage, strides, every dtype, zero elements and one element."""

    def __init__(self):
        super().__init__()
        table = torch.randn(6, 4)
        shaped = {"table": table, "transposed": table.t(), "part": table[1:4, ::2], "row": table[2].expand(3, 4)}
        shaped |= {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7)}
        for dtype in (torch.half, torch.bfloat16, torch.double, torch.uint8, torch.int8, torch.int16, torch.int32):
            shaped[str(dtype).replace("torch.", "of_")] = torch.arange(5).to(dtype)
        shaped["of_bool"] = torch.tensor([True, False, True])
        for name, tensor in shaped.items():
            self.register_buffer(name, tensor)
        self.child = nn.Linear(2, 2)
        self.same_child = self.child
        self.sizes, self.rates, self.flags = [3, 4], [0.5], {"a": 1}

    def forward(self, x):
        return self.same_child(self.child(x)) + self.sizes[0] + self.rates[0] + self.flags["a"]


def script(module, path):
    scripted = torch.jit.script(module)
    torch.jit.save(scripted, path)
    return scripted.state_dict()


def rewrite(path, change):
    """Rewrite an archive: `change(name, content)` returns the new name and content of a record, or None to drop it."""
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in filter(None, (change(*record) for record in records)):
            archive.writestr(name, content)


def assert_equal_states(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].stride() == tensor.stride(), name
        assert found[name].equal(tensor), name


@pytest.fixture(scope="module", params=["traced", "scripted"])
def clip_archive(request, tmp_path_factory):
    """A small CLIP in half precision, as a TorchScript archive and as its state dict."""
    torch.manual_seed(0)
    clip = SmallClip().eval()
    inputs = torch.randn(2, 3, 32, 32), torch.zeros(2, 4, dtype=torch.int64)
    traced = request.param == "traced"
    program = torch.jit.trace(clip, inputs, check_trace=False) if traced else torch.jit.script(clip)
    path = tmp_path_factory.mktemp(request.param) / "ViT-B-16.pt"
    torch.jit.save(program.half(), path)
    return path, clip.half().state_dict()


def test_a_torchscript_archive_gives_its_state_dict_to_the_bit(clip_archive):
    path, state = clip_archive
    assert state["visual.conv1.weight"].dtype == torch.float16 and "input_resolution" in state
    assert_equal_states(read_state_dict(path), state)
    assert_equal_states(read_state_dict(path), torch.jit.load(path).state_dict())


def test_archive_and_plain_state_dict_fill_the_tower_alike(clip_archive, tmp_path):
    path, state = clip_archive
    torch.save(state, tmp_path / "plain.pt")
    from_archive, from_plain = tiny_tower(), tiny_tower()
    for tower, file in ((from_archive, path), (from_plain, tmp_path / "plain.pt")):
        load_tower_weights(tower, find_architecture("ViT-B/16"), "ViT-B/16", str(file))
    assert hash_tensors(from_archive.state_dict()) == hash_tensors(from_plain.state_dict())
    assert from_archive.vit.blocks[2].mlp.fc1.weight.equal(
        state["visual.transformer.resblocks.2.mlp.c_fc.weight"].float()
    )


def test_an_archive_of_an_old_torch_saved_on_a_gpu_is_read(clip_archive, tmp_path):
    path = tmp_path / "clip.pt"
    path.write_bytes(clip_archive[0].read_bytes())

    def age(name, content):
        name = name.split("/", 1)[1]
        content = content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0") if name == "data.pkl" else content
        return None if name in ("byteorder", ".data/serialization_id") else (f"archive/{name}", content)

    rewrite(path, age)
    assert_equal_states(read_state_dict(path), clip_archive[1])


def test_views_shared_storages_and_every_type_come_back(tmp_path):
    state = script(Buffers(), tmp_path / "buffers.pt")
    found = read_state_dict(tmp_path / "buffers.pt")
    assert_equal_states(found, state)
    assert found["part"].untyped_storage().data_ptr() == found["table"].untyped_storage().data_ptr()
    assert "child.weight" in found and "same_child.weight" in found


class Call:
    """Its pickle calls `function` when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def write_hostile(path, form, call):
    if form == "torch.save":
        torch.save({"weight": torch.ones(2), "evil": call}, path)
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"evil": call}, protocol=2))
    else:
        script(nn.Linear(2, 2), path)
        payload = pickle.dumps(call, protocol=4 if form == "archive 4" else 2)
        rewrite(path, lambda name, content: (name, payload if name.endswith("data.pkl") else content))


@pytest.mark.parametrize("form", ["archive 2", "archive 4", "torch.save", "pickle"])
@pytest.mark.parametrize("function", [os.system, eval, exec, torch.load, torch.jit.load, getattr])
def test_a_file_that_would_call_something_is_refused_untouched(tmp_path, form, function):
    marker, path = tmp_path / "marker", tmp_path / "clip.pt"
    argument = f"touch {marker}" if function is os.system else f"open({str(marker)!r}, 'w')"
    write_hostile(path, form, Call(function, argument))
    with pytest.raises(CheckpointError, match=rf"clip.pt: .*asks for \S*{function.__name__}, .*refused") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value) and not marker.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused_in_one_line(clip_archive, tmp_path, share):
    whole = clip_archive[0].read_bytes()
    path = tmp_path / "clip.pt"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match="clip.pt: not a readable weight file: .+") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def drop_storage(name, content):
    return None if name.endswith("data/3") else (name, content)


def cut_storage(name, content):
    return name, content[:-8] if name.endswith("data/3") else content


def cut_pickle(name, content):
    return name, content[:200] if name.endswith("data.pkl") else content


def replace_pickle(name, content):
    return name, pickle.dumps({"a": 1}) if name.endswith("data.pkl") else content


@pytest.mark.parametrize(
    "change, complaint",
    [
        (drop_storage, "data/3"),
        (cut_storage, "out of bounds"),
        (cut_pickle, "readable weight file: "),
        (replace_pickle, "no dictionary of tensors"),
    ],
)
def test_a_damaged_archive_is_refused_in_one_line(clip_archive, tmp_path, change, complaint):
    path = tmp_path / "clip.pt"
    path.write_bytes(clip_archive[0].read_bytes())
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=f"clip.pt: .*{complaint}") as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)


def test_changed_bytes_of_a_storage_are_noticed(tmp_path):
    path = tmp_path / "clip.pt"
    weight = script(nn.Linear(8, 8), path)["weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[::-1]))
    with pytest.raises(CheckpointError, match="clip.pt: .*CRC"):
        read_state_dict(path)


def test_state_dicts_of_every_format_are_read(tmp_path):
    state = published_form(tiny_tower(), torch.float16)
    torch.save(state, tmp_path / "zip.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "new.safetensors")
    for name in ("zip.pt", "legacy.pt", "new.safetensors"):
        assert_equal_states(read_state_dict(tmp_path / name), state)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "new.safetensors").read_bytes()[:900])
    with pytest.raises(CheckpointError, match="cut.safetensors: not a readable weight file: .+"):
        read_state_dict(tmp_path / "cut.safetensors")
