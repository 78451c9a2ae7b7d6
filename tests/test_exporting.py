"""Exported models: the scores of the model, from one file or two, whatever the tower."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import save_untrained

from engine.loops import view_scores
from inference import Recognizer, exporting
from inference.exporting import BATCHES, METADATA, TOLERANCE, example_clips, export
from inference.inputs import given_videos
from tools import export as export_program
from tools.motion_demo import CLASSES
from utils.errors import ConfigError, DataError
from utils.published_weights import hash_file

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TINY = {"embed_dim": 64, "depth": 1, "num_heads": 2}
# Family -> tower, pixels of a frame, more keys of `network`. EVA's side network reads every second block.
FAMILIES = {
    "CLIP": ("ViT-B/16", 32, {}),
    "EVA": ("EVA02-CLIP-L-14", 28, {"backbone_kwargs": {**TINY, "depth": 2}}),
    "DINOv2 with registers": ("timm/vit_base_patch14_reg4_dinov2", 28, {}),
    "DINOv3": ("timm/vit_base_patch16_dinov3", 32, {}),
    "SigLIP 2": ("timm/vit_base_patch16_siglip_224.v2_webli", 32, {}),
    "timm": ("timm/vit_tiny_patch16_224", 32, {}),
    "bfloat16": ("ViT-B/16", 32, {"backbone_dtype": "bfloat16"}),
}


@pytest.fixture
def make(config, tmp_path):
    """make(family) -> Recognizer of m.pt, on the CPU in float32."""

    def built(family="timm"):
        arch, size, network = FAMILIES[family]
        content = yaml.safe_load(Path(config).read_text())
        content["data"] |= {"input_size": size, "resize": size + 8, "num_segments": 3}
        content["network"] = {"arch": arch, "init": False, "side_dim": 64, "backbone_kwargs": TINY, **network}
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(content))
        save_untrained(tmp_path / "m.yaml", tmp_path / "m.pt")
        dtype = [f"network.backbone_dtype={network['backbone_dtype']}"] if "backbone_dtype" in network else []
        return Recognizer.load(tmp_path / "m.pt", device="cpu", precision="fp32", overrides=dtype)

    return built


def clips_of(recognizer, clips, seed=3):
    return example_clips(recognizer.config.data, clips, seed)


def torch_scores(recognizer, clips):
    with torch.no_grad():
        return exporting.ScoringGraph(recognizer.model, recognizer.config.data)(clips).numpy()


def check_of(recognizer):
    return {"random": clips_of(recognizer, max(BATCHES))}


def run_onnx(path, **inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_onnx_graph_of_each_family_gives_the_scores_of_the_model_for_any_batch(make, tmp_path, family):
    recognizer = make(family)
    done = export(recognizer, tmp_path / "m.onnx", "0" * 64, check=check_of(recognizer))
    assert [(found.clips, found.batch) for found in done.differences] == [("random", batch) for batch in BATCHES]
    clips = clips_of(recognizer, 5, seed=4)
    (scores,) = run_onnx(tmp_path / "m.onnx", clips=clips.numpy())
    expected = torch_scores(recognizer, clips)
    assert scores.dtype == np.float32 and scores.shape == (5, len(CLASSES))
    assert done.tolerance == (1e-4 if family != "bfloat16" else 2e-2)
    assert np.abs(scores - expected).max() <= done.tolerance
    assert expected.std(axis=0).max() > 3 * done.tolerance  # clips differ by more than they may be apart
    model = onnx.load(tmp_path / "m.onnx")
    (shape,) = [put.type.tensor_type for put in model.graph.input]
    assert shape.elem_type == onnx.TensorProto.UINT8 and shape.shape.dim[0].dim_param == "batch"
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", exporting.OPSET)]


@pytest.mark.parametrize("family", ["CLIP", "EVA", "bfloat16"])
def test_a_program_gives_the_bits_of_the_model(make, tmp_path, family):
    recognizer = make(family)
    done = export(recognizer, tmp_path / "m.pt2", "0" * 64, check=check_of(recognizer))
    assert done.tolerance == TOLERANCE and [found.largest for found in done.differences] == [0.0, 0.0]
    clips = clips_of(recognizer, 4, seed=4)
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert np.array_equal(program(clips).numpy(), torch_scores(recognizer, clips))


@pytest.mark.parametrize("kind, family", [(".onnx", "EVA"), (".pt2", "CLIP")])
def test_two_graphs_share_the_work_and_give_the_scores_of_one(make, tmp_path, kind, family):
    recognizer = make(family)
    done = export(recognizer, tmp_path / f"m{kind}", "0" * 64, split=True, check=check_of(recognizer))
    assert [path.name for path, _ in done.files] == [f"m-frames{kind}", f"m-mix{kind}"]
    assert not (tmp_path / f"m{kind}").exists()
    clips = clips_of(recognizer, 5, seed=4)
    run = exporting.runner([path for path, _ in done.files], onnxruntime if kind == ".onnx" else None)
    expected = torch_scores(recognizer, clips)
    assert np.abs(run(clips) - expected).max() <= TOLERANCE < expected.std(axis=0).max()
    if kind == ".onnx":  # a frame by itself gives what it gives among others
        products, tokens = run_onnx(tmp_path / "m-frames.onnx", frames=clips.flatten(0, 1).numpy())
        alone = run_onnx(tmp_path / "m-frames.onnx", frames=clips[1, :1].numpy())
        assert products.shape == (15, 4, 3 * 64) and tokens.shape == (15, 1, 5, 64)
        for part, of_one in zip((products, tokens), alone, strict=True):
            assert np.abs(part[3:4] - of_one).max() < 1e-5
    assert differs(recognizer, run, clips)


def differs(recognizer, run, clips):
    """Whether the order of the frames changes the scores."""
    return np.abs(run(clips) - run(clips.flip(1))).max() > TOLERANCE


def test_the_metadata_say_what_a_user_must_know(make, tmp_path):
    recognizer = make()
    data = recognizer.config.data
    digest = hash_file(tmp_path / "m.pt")
    for kind in (".onnx", ".pt2"):
        export(recognizer, tmp_path / f"m{kind}", digest)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    extra = {METADATA: ""}
    torch.export.load(tmp_path / "m.pt2", extra_files=extra)
    versions, of_program = json.loads(facts.pop("versions")), json.loads(extra[METADATA])
    assert {"side4video", "commit", "torch", "timm", "onnx", "onnxscript"} == set(versions)
    assert {"side4video", "commit", "torch", "timm"} == set(json.loads(of_program.pop("versions")))
    assert facts == {**of_program, "opset": str(exporting.OPSET)}
    pixels = {"size": 32, "resize": 40, "mean": list(data.mean), "std": list(data.std)}
    assert json.loads(facts["pixels"]) == pixels and json.loads(facts["class_names"]) == list(CLASSES)
    assert (facts["frames"], facts["protocol"], facts["dense"]) == ("3", "kinetics", "false")
    assert (facts["checkpoint_sha256"], facts["graph"], facts["precision"]) == (digest, "whole", "float32")
    for kind in (".onnx", ".pt2"):  # nothing about the machine
        content = (tmp_path / f"m{kind}").read_bytes()
        assert str(Path(__file__).parent.parent).encode() not in content and b"site-packages" not in content


def test_weights_beyond_the_limit_of_a_file_are_beside_it(make, tmp_path, monkeypatch):
    recognizer, folder = make(), tmp_path / "out"
    monkeypatch.setattr(exporting, "MOST_INSIDE", 1000)
    done = export(recognizer, folder / "m.onnx", "0" * 64, check=check_of(recognizer))
    assert [path.name for path, _ in done.files] == ["m.onnx.data", "m.onnx"]
    weights = sum(parameter.nbytes for parameter in recognizer.model.parameters())
    assert done.files[0][1] == pytest.approx(weights, rel=0.1)
    folder.rename(tmp_path / "moved")
    clips = clips_of(recognizer, 2)
    (scores,) = run_onnx(tmp_path / "moved" / "m.onnx", clips=clips.numpy())
    assert np.abs(scores - torch_scores(recognizer, clips)).max() <= TOLERANCE
    (tmp_path / "moved" / "m.onnx.data").unlink()
    with pytest.raises(Exception, match="m.onnx.data"):
        run_onnx(tmp_path / "moved" / "m.onnx", clips=clips.numpy())


def test_no_file_of_an_older_export_stays_beside_a_new_one(make, tmp_path):
    recognizer = make()
    for name in ("m.pt2", "m.pt2.data", "m-mix.pt2"):
        (tmp_path / name).write_bytes(b"old")
    export(recognizer, tmp_path / "m.pt2", "0" * 64)
    assert (tmp_path / "m.pt2").stat().st_size > 1000
    assert not (tmp_path / "m.pt2.data").exists() and (tmp_path / "m-mix.pt2").read_bytes() == b"old"


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
def test_half_stores_and_multiplies_in_float16_but_normalises_batches_in_float32(make, tmp_path, kind):
    recognizer = make("CLIP")
    before = {name: tensor.clone() for name, tensor in recognizer.model.state_dict().items()}
    done = export(recognizer, tmp_path / f"half{kind}", "0" * 64, half=True, check=check_of(recognizer))
    weights = sum(parameter.nbytes for parameter in recognizer.model.parameters())
    assert done.files[0][1] < weights
    assert done.tolerance == exporting.COARSE_TOLERANCE
    assert 0 < max(found.largest for found in done.differences) <= done.tolerance
    assert all(torch.equal(tensor, before[name]) for name, tensor in recognizer.model.state_dict().items())
    if kind == ".onnx":
        kinds = {t.data_type for t in onnx.load(tmp_path / "half.onnx").graph.initializer if np.prod(t.dims) > 1000}
        assert kinds == {onnx.TensorProto.FLOAT16}


def test_a_file_that_gives_other_scores_is_not_kept(make, tmp_path, monkeypatch):
    recognizer, original = make(), exporting.runner
    (tmp_path / "m.pt2").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    for name, wrong in (("m", lambda scores: scores + np.float32(2e-4)), ("new", lambda scores: scores * np.nan)):

        def runner(*arguments, wrong=wrong):
            return lambda clips: wrong(original(*arguments)(clips))

        monkeypatch.setattr(exporting, "runner", runner)
        with pytest.raises(exporting.DifferenceError, match="not written: scores differ from PyTorch's by") as caught:
            export(recognizer, tmp_path / f"{name}.pt2", "0" * 64, check=check_of(recognizer))
        assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "m.pt2").read_bytes() == b"old"


def test_what_cannot_be_exported_says_so_in_one_line(make, tmp_path, monkeypatch):
    recognizer = make()

    def fail(*_, **__):
        raise RuntimeError("\nthis operator has no form in a file\nand a long explanation\n")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(ConfigError) as caught:
        export(recognizer, tmp_path / "a.onnx", "0" * 64)
    expected = "cannot be exported as .onnx (this operator has no form in a file)"
    assert str(caught.value) == f"network.arch: timm/vit_tiny_patch16_224 {expected}"
    assert not list(tmp_path.glob("*a.onnx*"))


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_before_the_work(make, tmp_path, monkeypatch, name):
    recognizer = make()
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"ONNX files need {name}, .* requirements-extras.txt, or write a .pt2 file"):
        export(recognizer, tmp_path / "a.onnx", "0" * 64, check=check_of(recognizer))
    assert not list(tmp_path.glob("*a.onnx*"))


def test_the_command_writes_and_verifies_on_random_and_real_clips(make, tmp_path, motion_root, capsys, monkeypatch):
    make()
    checked = {}
    original = exporting.compare
    monkeypatch.setattr(exporting, "compare", lambda run, r, check: checked.update(check) or original(run, r, check))
    arguments = [str(tmp_path / "m.pt"), str(tmp_path / "new" / "m.pt2"), "--verify"]
    export_program.main(arguments)
    printed = capsys.readouterr().out.splitlines()
    size = (tmp_path / "new" / "m.pt2").stat().st_size
    assert printed[0] == f"{tmp_path}/new/m.pt2: {size / 1e6:.1f} MB"
    assert [line.split(":")[0].strip() for line in printed[1:]] == [
        *(f"{kind} clips, batch {batch}" for kind in ("random", "real") for batch in BATCHES),
        "verified",
    ]
    # The real clips are those of a test: the first video of the list, as many clips as the largest batch.
    video = motion_root / "frames" / "val_00000"
    recognizer = Recognizer.load(tmp_path / "m.pt")
    seen = []
    paths = given_videos([video])
    list(recognizer.outputs(paths, lambda clips: seen.append(clips) or recognizer.model(clips), view_scores, clips=3))
    pixels = exporting.Pixels(recognizer.config.data)
    assert torch.equal(pixels(checked["real"]), seen[0])
    other = export_program.clips_to_check(recognizer, str(motion_root / "videos" / "val_00001.mp4"))
    assert not torch.equal(other["real"], checked["real"])
    recognizer.config.data.val_list = "gone.txt"
    with pytest.raises(DataError, match="--verify needs a real clip .*gone.txt.*name a video by --video FILE"):
        export_program.clips_to_check(recognizer, None)
