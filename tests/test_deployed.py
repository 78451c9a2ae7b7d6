"""inference/deployed.py alone gives the frames, pixels, scores and windows of the project, without PyTorch."""

import ast
import importlib.util
import shutil
import subprocess
import sys

import av
import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import REPOSITORY, pillow_resize, save_untrained, score_run, spoil_packets, write_packets, write_video

from datasets.decoders import upright_frames
from datasets.sampling import sample_test
from datasets.transforms import EvalTransform
from inference import Recognizer
from inference.exporting import export
from tools.motion_demo import CLASSES

pytest.importorskip("onnxruntime")
SOURCE = REPOSITORY / "inference" / "deployed.py"


def load(path):
    spec = importlib.util.spec_from_file_location("deployed_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


deployed = load(SOURCE)


@pytest.fixture(scope="module")
def folder(motion_root, tmp_path_factory):
    """A folder with m.pt, what is exported from it, and deployed.py; test.yaml reads the videos of motion_root."""
    root = tmp_path_factory.mktemp("server")
    data = {"dataset": "motion_demo", "num_segments": 4, "batch_size": 4, "workers": 0, "num_classes": len(CLASSES)}
    data |= {"label_list": str(motion_root / "classes.csv"), "input_size": 32, "resize": 40, "modality": "video"}
    data |= {f"{part}_root": str(motion_root / "videos") for part in ("train", "val")}
    data |= {f"{part}_list": str(motion_root / "val_videos.txt") for part in ("train", "val")}
    network = {"arch": "ViT-B/16", "init": False, "side_dim": 64}
    network["backbone_kwargs"] = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    tree = {"data": data, "network": network, "solver": {"epochs": 1, "lr": 1e-3}}
    (root / "test.yaml").write_text(yaml.safe_dump(tree))
    save_untrained(root / "test.yaml", root / "m.pt")
    recognizer = Recognizer.load(root / "m.pt")
    export(recognizer, root / "m.onnx", "0" * 64)
    export(recognizer, root / "m.onnx", "0" * 64, split=True)
    shutil.copy(SOURCE, root)
    return root


@pytest.fixture(scope="module")
def recognizer(folder):
    return Recognizer.load(folder / "m.pt")


def model_of(size=32, resize=40, frames=4, protocol="kinetics", dense=False):
    """A Model that has a graph's metadata, and no graph."""
    model = object.__new__(deployed.Model)
    model.frames, model.pixels = frames, {"size": size, "resize": resize}
    model.facts = {"protocol": protocol, "dense": str(dense).lower()}
    return model


def test_it_is_short_and_imports_nothing_of_the_project():
    text = SOURCE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    imported = {alias.name for node in ast.walk(ast.parse(text)) for alias in getattr(node, "names", ())}
    assert imported - sys.stdlib_module_names == {"av", "numpy", "onnxruntime"}


def test_it_runs_alone_in_a_folder_where_torch_cannot_be_imported(folder, motion_root, recognizer):
    video = str(motion_root / "videos" / "val_00001.mp4")
    blocked = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('deployed.py', run_name='__main__')"
    for options in (["--crops", "3", "--clips", "2"], ["--window", "0.16"]):
        command = [sys.executable, "-c", blocked, "m.onnx", video, *options]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        if options[0] == "--crops":
            expected = recognizer.predict(video, crops=3, clips=2)
            assert done.stdout == "".join(f"  {score:.4f}  {name}\n" for name, score in expected)
        else:
            assert len(done.stdout.splitlines()) == len(list(recognizer.stream(video, 0.16))) > 1
    done = subprocess.run([*command[:4], "gone.mp4"], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "gone.mp4" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("crops, clips", [(1, 1), (3, 2), (5, 1), (10, 3)])
def test_scores_are_those_of_a_test(folder, motion_root, crops, clips, tmp_path):
    views = ["--test_crops", str(crops), "--test_clips", str(clips)]
    saved = score_run(str(folder / "test.yaml"), folder / "m.pt", tmp_path / "s.npz", *views)
    model = deployed.Model(folder / "m.onnx")
    assert model.names == saved["class_names"].tolist()
    for path, expected in zip(saved["paths"], saved["scores"], strict=True):
        scores = model.scores(str(motion_root / "videos" / path), crops, clips)
        assert scores.dtype == np.float32 and np.abs(scores - expected).max() < 1e-5
    assert saved["scores"].std(axis=0).max() > 0.01  # videos differ by more than they may be apart


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("protocol", ["kinetics", "something"])
def test_frames_are_those_of_the_protocols(protocol, dense):
    rng = np.random.default_rng(0)
    for _ in range(400):
        n, frames, clips = int(rng.integers(1, 700)), int(rng.integers(1, 33)), int(rng.integers(1, 11))
        found = model_of(frames=frames, protocol=protocol, dense=dense).indices(n, clips)
        assert np.array_equal(found, sample_test(n, frames, protocol, clips, dense)), (n, frames, clips)


def test_a_resize_is_pillows():
    rng = np.random.default_rng(1)
    for _ in range(60):
        width, height, new_width, new_height = (int(side) for side in rng.integers(1, 200, 4))
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = pillow_resize(Image.fromarray(frame), (new_width, new_height), Image.Resampling.BICUBIC)
        found = deployed.resized(frame, new_height, new_width)
        assert found.dtype == np.uint8 and np.array_equal(found, np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("crops", [1, 3, 5, 10])
def test_views_are_those_of_the_transform_for_frames_of_any_size(crops):
    rng = np.random.default_rng(crops)
    for number in range(12):
        size = int(rng.integers(8, 60))
        resize = int(rng.integers(size, 80)) if number % 2 else rng.integers(size, 90, 2).tolist()
        shapes = [rng.integers(5, 120, 2)] * 2 + [rng.integers(5, 120, 2)]  # a file may change its size
        frames = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
        found = model_of(size, resize).views(frames, crops)
        assert np.array_equal(found, EvalTransform(size, resize, crops)(frames).numpy())


def write_interlaced(path):
    """H.264 whose frames are flagged as two fields, of a known colour matrix."""
    options = {"x264-params": "interlaced=1:tff=1:colormatrix=bt709:range=tv"}
    write_packets(path, 6, options=options)


VIDEOS = {
    "plain.mp4": lambda path: write_video(path, 1, 7, (50, 34)),
    "webm.webm": lambda path: write_video(path, 2, 7, (48, 32)),
    "turned.mp4": lambda path: write_video(path, 3, 7, (48, 32), angle=90),
    "turned_left.mp4": lambda path: write_video(path, 3, 7, (48, 32), angle=270),
    "reordered.mkv": lambda path: write_packets(path, 30, b_frames=3),
    "chroma.mkv": lambda path: write_packets(path, 5, pixel_format="yuv444p"),
    "interlaced.mkv": write_interlaced,
    "odd: name.avi": lambda path: write_packets(path, 5, codec="mpeg4"),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_of_a_file_are_those_of_the_reader(name, tmp_path):
    VIDEOS[name](tmp_path / name)
    found = [deployed.upright(frame) for frame in deployed.decoded(str(tmp_path / name))]
    expected = list(upright_frames(tmp_path / name))
    assert len(found) == len(expected) > 4
    assert all(np.array_equal(frame, other) for frame, other in zip(found, expected, strict=True))
    if name == "interlaced.mkv":
        with av.open(str(tmp_path / name)) as container:
            assert all(frame.interlaced_frame for frame in container.decode(video=0))


def test_packets_that_cannot_be_decoded_are_passed_over(tmp_path):
    write_packets(tmp_path / "a.mkv", 30)
    spoil_packets(tmp_path / "a.mkv", [5])
    found = [deployed.upright(frame) for frame in deployed.decoded(str(tmp_path / "a.mkv"))]
    expected = list(upright_frames(tmp_path / "a.mkv"))
    assert len(found) == len(expected) and all(map(np.array_equal, found, expected))


def write_rated(path, times):
    """Frames of noise, shown from these seconds on."""
    rng = np.random.default_rng(5)
    frames = [rng.integers(0, 256, (48, 56, 3), dtype=np.uint8) for _ in times]
    write_packets(path, frames, options={"qp": "0"}, times=[round(1000 * time) for time in times])


STEADY, VARIABLE = [number / 25 for number in range(14)], [2 + n / 25 + (0.3 if n >= 9 else 0) for n in range(14)]


@pytest.mark.parametrize(
    "times, window, stride", [(STEADY, 0.16, None), (STEADY, 0.32, 0.16), (VARIABLE, 0.2, 0.1), (STEADY, 0.08, 0.12)]
)
def test_windows_are_those_of_a_stream(folder, recognizer, tmp_path, times, window, stride):
    write_rated(tmp_path / "a.mkv", times)
    frames, mix = deployed.Model(folder / "m-frames.onnx", "frames"), deployed.Model(folder / "m-mix.onnx", "mix")
    seen, run = [], frames.run
    frames.run = lambda frames: seen.append(frames) or run(frames=frames)
    stream = recognizer.stream(tmp_path / "a.mkv", window, stride)
    expected = list(stream)
    found = list(deployed.windows(frames, mix, str(tmp_path / "a.mkv"), window, stride))
    assert len(found) == len(expected) > 1 and len(seen) == stream._scorer.frames
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[:2] == pytest.approx(theirs[:2]) and np.abs(ours[2] - theirs.scores).max() < 1e-5
    assert np.abs(found[0][2] - found[-1][2]).max() > 1e-3  # windows differ by more than they may be apart


def test_what_cannot_be_scored_is_refused(folder, tmp_path):
    frames, mix = deployed.Model(folder / "m-frames.onnx", "frames"), deployed.Model(folder / "m-mix.onnx", "mix")
    write_rated(tmp_path / "a.mkv", STEADY)
    with pytest.raises(ValueError, match="no multiple of 0.04 s"):
        next(deployed.windows(frames, mix, str(tmp_path / "a.mkv"), 0.16, 0.05))
    with pytest.raises(ValueError, match="shorter than a window"):
        list(deployed.windows(frames, mix, str(tmp_path / "a.mkv"), 4.0))
    mix.facts = {**mix.facts, "checkpoint_sha256": "1" * 64}
    with pytest.raises(ValueError, match="two checkpoints"):
        next(deployed.windows(frames, mix, str(tmp_path / "a.mkv"), 0.16))
    with pytest.raises(ValueError, match="is not the graph 'whole'"):
        deployed.Model(folder / "m-mix.onnx")
    with pytest.raises(KeyError):
        model_of().views([np.zeros((40, 40, 3), np.uint8)], crops=2)
