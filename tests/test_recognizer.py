"""A checkpoint that answers: the same scores as test.py, whatever the checkpoint's age, form and tower."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import REPOSITORY, published_form, save_untrained, score_run

from inference import Recognizer
from inference.inputs import find_videos, template_of
from modules import tower_files
from modules.checkpoint import read_checkpoint, save_checkpoint, save_released
from modules.pretrained import load_tower_weights
from tools.motion_demo import CLASSES
from utils.errors import CheckpointError, ConfigError, DataError, UserError

TEMPLATE = "img_{:05d}.jpg"


@pytest.fixture
def config(config):
    """The tiny configuration with clips and crops that differ: 2 of 6 frames, and room around the crop."""
    content = yaml.safe_load(Path(config).read_text())
    content["data"] |= {"num_segments": 2, "resize": 40}
    Path(config).write_text(yaml.safe_dump(content))
    return config


@pytest.fixture
def video(motion_root):
    return motion_root / "videos" / "val_00001.mp4"


def scores_of(recognizer, records, **views):
    return np.stack([video.scores for video in recognizer.score_videos(records, **views)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("crops, clips", [(1, 1), (3, 2)])
@pytest.mark.parametrize("kind", ["frames", "videos"])
def test_scores_equal_those_of_a_test_bit_for_bit(
    checkpoint, config, motion_root, tmp_path, kind, crops, clips, workers
):
    list_path = str(motion_root / ("val.txt" if kind == "frames" else "val_videos.txt"))
    source = [f"data.modality={'RGB' if kind == 'frames' else 'video'}", f"data.val_list={list_path}"]
    views = ["--test_crops", str(crops), "--test_clips", str(clips)]
    saved = score_run(config, checkpoint, tmp_path / "s.npz", *views, *source, f"data.val_root={motion_root / kind}")
    recognizer = Recognizer.load(checkpoint, workers=workers)
    videos = list(recognizer.score_videos(find_videos([list_path], TEMPLATE, motion_root / kind), crops, clips))
    assert np.array_equal(np.stack([video.scores for video in videos]), saved["scores"])
    assert videos[0].scores.dtype == np.float32 and [video.num_frames for video in videos] == [6] * 7
    assert [os.path.relpath(video.path, motion_root / kind) for video in videos] == saved["paths"].tolist()


def test_files_and_folders_can_be_mixed_and_keep_their_order(recognizer, motion_root):
    paths = [motion_root / path for path in ("frames/val_00002", "videos/val_00001.mp4", "frames/val_00000")]
    together = recognizer.scores(paths, crops=3, clips=2)
    assert together.shape == (3, len(CLASSES)) and together.dtype == np.float32
    for path, scores in zip(paths, together, strict=True):
        assert np.abs(recognizer.scores([path], crops=3, clips=2)[0] - scores).max() < 1e-6


def test_a_score_is_the_mean_over_views_of_the_softmax_of_their_logits(recognizer, video):
    (scores,) = recognizer.scores([video], crops=3, clips=2)
    records = find_videos([video], TEMPLATE)
    ((_, _, logits, _),) = recognizer.outputs(records, recognizer.model, lambda logits: logits, crops=3, clips=2)
    assert logits.shape == (6, len(CLASSES))
    assert np.abs(logits.softmax(-1).mean(0).numpy() - scores).max() < 1e-6
    assert np.abs(logits.mean(0).softmax(-1).numpy() - scores).max() > 1e-3  # so the order of the two shows


def test_predict_names_the_classes_of_the_highest_scores(recognizer, video):
    (scores,) = recognizer.scores([video])
    expected = sorted(zip(CLASSES, scores.tolist(), strict=True), key=lambda pair: -pair[1])
    assert recognizer.predict(video, topk=3) == expected[:3]
    assert recognizer.predict(str(video), topk=99) == expected


def test_features_are_what_the_head_reads(recognizer, video):
    features = recognizer.features(video)
    assert features.shape == (64,) and features.dtype == np.float32
    with torch.no_grad():
        scores = recognizer.model.trained.head(torch.from_numpy(features)).softmax(-1)
    assert np.abs(scores.numpy() - recognizer.scores([video])[0]).max() < 1e-6
    views = [recognizer.features(video, crops=crops, clips=2) for crops in (1, 3)]
    assert np.abs(views[0] - views[1]).max() > 1e-6
    assert np.abs(views[0] - features).max() > 1e-6


def test_tokens_are_the_towers_frame_by_frame_and_layer_by_layer(recognizer, video):
    tokens = recognizer.features(video, tokens=True)
    assert iter(tokens) is tokens
    tokens = list(tokens)
    # 2 of 6 frames by the rule of kinetics: int(i * 6 / 2)
    assert [(item.layer, item.frame) for item in tokens] == [(0, 0), (0, 3), (1, 0), (1, 3)]
    clips = []
    list(recognizer.outputs(find_videos([video], TEMPLATE), lambda batch: clips.append(batch) or batch, lambda x: x))
    expected = [*recognizer.model.backbone.layer_tokens(clips[0])]
    for item, of_frame in zip(tokens, torch.cat(expected).flatten(0, 1), strict=True):
        assert item.tokens.shape == (17, 32) and item.tokens.dtype == np.float32
        assert np.array_equal(item.tokens, of_frame.numpy())
    with pytest.raises(ValueError, match="one view"):
        recognizer.features(video, tokens=True, crops=3)


def test_old_checkpoints_hold_open_values_and_answer_alike(checkpoint, recognizer, video, tmp_path):
    content = read_checkpoint(checkpoint)
    data, network = content["config"]["data"], content["config"]["network"]
    for section, key in ((data, "protocol"), (data, "mean"), (data, "std"), (network, "side_layers")):
        section[key] = None
    del network["side_variant"], data["on_error"], content["config"]["test"]
    content["config"]["solver"]["optim"] = "adamw"  # a key that the schema no longer has
    save_checkpoint(tmp_path / "old.pt", content)
    old = Recognizer.load(tmp_path / "old.pt")
    assert np.array_equal(old.scores([video]), recognizer.scores([video]))


def test_what_the_machine_of_the_training_decided_is_decided_anew(checkpoint, recognizer, video, tmp_path):
    content = read_checkpoint(checkpoint)
    content["config"]["network"] |= {"backbone_dtype": "bfloat16", "shard_backbone": True}
    content["config"]["data"] |= {"workers": 64, "val_list": "gone.txt", "label_list": "gone.csv"}
    content["config"]["solver"]["precision"] = "bf16"
    save_checkpoint(tmp_path / "gpu.pt", content)
    other = Recognizer.load(tmp_path / "gpu.pt")
    assert other.model.backbone.dtype == torch.float32 and other.precision.name == "fp32"
    assert np.array_equal(other.scores([video]), recognizer.scores([video]))
    assert Recognizer.load(tmp_path / "gpu.pt", precision="bf16").model.backbone.dtype == torch.float32  # on a CPU
    half = Recognizer.load(tmp_path / "gpu.pt", precision="bf16", overrides=["network.backbone_dtype=bfloat16"])
    assert half.model.backbone.dtype == torch.bfloat16 and half.precision.name == "bf16"
    assert 0 < np.abs(half.scores([video]) - other.scores([video])).max() < 0.1


def test_a_folder_and_safetensors_are_checkpoints_too(config, checkpoint, recognizer, video, tmp_path):
    expected = recognizer.scores([video])
    save_untrained(config, tmp_path / "m.safetensors")
    (tmp_path / "published").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "published" / "m.safetensors")
    for source in (tmp_path, tmp_path / "published", tmp_path / "published" / "m.safetensors"):
        assert np.array_equal(Recognizer.load(source).scores([video]), expected)
    (tmp_path / "published" / "n.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"holds several checkpoints \(m.safetensors, n.safetensors\)"):
        Recognizer.load(tmp_path / "published")


@pytest.fixture
def clip_config(config):
    """The tiny configuration with a CLIP tower."""
    content = yaml.safe_load(Path(config).read_text())
    content["network"]["arch"] = "ViT-B/16"
    Path(config).write_text(yaml.safe_dump(content))
    return config


def test_a_released_checkpoint_answers_with_its_configuration(clip_config, video, tmp_path):
    model = save_untrained(clip_config, tmp_path / "ours.pt")
    save_released(tmp_path / "released.pt", model)
    with pytest.raises(ConfigError, match="released.pt: a released checkpoint holds no configuration"):
        Recognizer.load(tmp_path / "released.pt")
    released = Recognizer.load(tmp_path / "released.pt", config=clip_config)
    ours = Recognizer.load(tmp_path / "ours.pt")
    assert released.class_names == ours.class_names == list(CLASSES)
    assert np.array_equal(released.scores([video]), ours.scores([video]))
    unnamed = Recognizer.load(tmp_path / "released.pt", config=clip_config, overrides=["data.label_list=None"])
    assert unnamed.class_names == [f"class {label}" for label in range(10)]
    with pytest.raises(ConfigError, match="holds its own configuration"):
        Recognizer.load(tmp_path / "ours.pt", config=clip_config)


@pytest.fixture
def beside_a_file(clip_config, tmp_path, monkeypatch):
    """A checkpoint that names the file of its tower, in a folder with an empty clip_pretrain/; (path, weights)."""
    monkeypatch.chdir(tmp_path)
    Path("clip_pretrain").mkdir()
    model = save_untrained(clip_config, tmp_path / "ours.pt")
    weights = published_form(model.backbone)
    torch.save(weights, "tower.pt")
    load_tower_weights(model.backbone, tower_files.find_architecture("ViT-B/16"), "ViT-B/16", "tower.pt")
    content = read_checkpoint(tmp_path / "ours.pt")
    content |= {"tower": None, "tower_file": "ViT-B-16.pt", **model.backbone.hashes}
    save_checkpoint(tmp_path / "named.pt", content)
    return tmp_path / "named.pt", weights


def test_the_towers_file_is_found_by_its_hash_under_any_name(beside_a_file, video, monkeypatch, caplog):
    path, weights = beside_a_file
    expected = Recognizer.load("ours.pt").scores([video])
    assert np.array_equal(Recognizer.load(path, weights="tower.pt").scores([video]), expected)
    other = {name: tensor + 1 if name == "visual.conv1.weight" else tensor for name, tensor in weights.items()}
    torch.save(other, "clip_pretrain/ViT-B-16.pt")  # the right name of another tower
    Path("clip_pretrain/notes.pt").write_text("small")
    Path("clip_pretrain/b.pt").write_bytes(bytes(10**6))  # no weights, though large
    read = []
    real = tower_files.load_tower_weights
    monkeypatch.setattr(tower_files, "load_tower_weights", lambda *args: read.append(args[3]) or real(*args))
    caplog.clear()
    with pytest.raises(CheckpointError, match="named.pt: needs the tower .* ViT-B-16.pt") as caught:
        Recognizer.load(path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]  # of files that are not used
    assert "ViT-B-16.pt (another tower), clip_pretrain/b.pt (does not fit)" in caught.value.line
    assert read == ["clip_pretrain/ViT-B-16.pt", "clip_pretrain/b.pt"]  # small ones are not read
    with pytest.raises(CheckpointError, match="another frozen tower"):
        Recognizer.load(path, weights="clip_pretrain/ViT-B-16.pt")
    torch.save(weights, "clip_pretrain/renamed")
    torch.save(weights, "clip_pretrain/a.part")  # of a download that is not finished
    assert np.array_equal(Recognizer.load(path).scores([video]), expected)
    assert "clip_pretrain/a.part" not in read


def test_a_checkpoint_with_its_tower_takes_no_other(checkpoint):
    with pytest.raises(ConfigError, match="tower.pt: not needed, .* holds its tower"):
        Recognizer.load(checkpoint, weights="tower.pt")


def test_mistakes_are_one_line(recognizer, checkpoint, video, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    for call, message in [
        (lambda: recognizer.predict("gone.mp4"), "^gone.mp4: no such file or folder; named by argument 1"),
        (lambda: recognizer.scores([video, tmp_path / "broken.mp4"]), "broken.mp4: pyav cannot read it"),
        (lambda: recognizer.features("gone.mp4"), "^gone.mp4: "),
        (lambda: recognizer.features("gone.mp4", tokens=True), "^gone.mp4: "),
        (lambda: recognizer.scores([]), "no videos given"),
        (lambda: recognizer.scores([video], crops=2), "crops: must be one of 1, 3, 5, 10, got 2"),
        (lambda: recognizer.scores([video], clips=0), "clips: must be at least 1, got 0"),
        (lambda: Recognizer.load(checkpoint, device="abacus"), "device: abacus cannot be used here"),
        (lambda: Recognizer.load(checkpoint, precision="fp8"), "solver.precision: is 'fp8'"),
        (lambda: Recognizer.load(checkpoint, overrides=["data.image_tmp=x"]), "did you mean data.image_tmpl"),
        (lambda: Recognizer.load(tmp_path / "gone.pt"), "gone.pt: no such checkpoint"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in caught.value.line
    with pytest.raises(TypeError, match=r"scores\(\[path\]\)"):
        recognizer.scores(str(video))


def test_videos_that_cannot_be_read_stop_nothing_and_keep_their_places(recognizer, motion_root, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    good = [motion_root / "videos" / f"val_{number:05d}.mp4" for number in range(6)]
    paths = ["gone.mp4", *good[:2], tmp_path / "broken.mp4", *good[2:], tmp_path / "broken.mp4"]
    videos = list(recognizer.score_videos(find_videos(paths, TEMPLATE)))
    assert [video.path for video in videos] == [str(path) for path in paths]
    failed = [video for video in videos if video.error]
    assert [videos.index(failed[0]), len(failed)] == [0, 3] and videos[3].error and videos[-1].error
    assert {(video.num_frames, video.scores, video.views) for video in failed} == {(None, None, 0)}
    assert all(video.views == 1 and video.num_frames == 6 for video in videos if not video.error)


# what is to be recognised


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def paths_below(root, *paths, **options):
    records = find_videos(paths or [root], TEMPLATE, **options)
    return [os.path.relpath(record.path, root) for record in records]


def test_a_directory_gives_its_videos_and_frame_folders_at_any_depth(tmp_path):
    touch(tmp_path, "b.mp4", "a/z.MKV", "a/notes.txt", "a/cover.jpg", ".hidden.mp4", ".hidden/x.mp4", "empty/.keep")
    touch(tmp_path, f"frames/{TEMPLATE.format(1)}", f"frames/{TEMPLATE.format(2)}", "others/frame1.png")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert paths_below(tmp_path) == ["a/z.MKV", "b.mp4", "frames", "link/z.MKV", "others"]
    assert paths_below(tmp_path, tmp_path / "frames", tmp_path / "b.mp4") == ["frames", "b.mp4"]


def test_a_directory_without_videos_is_named_in_a_row_of_its_own(recognizer, tmp_path):
    touch(tmp_path, "below/deeper/notes.md")
    (video,) = recognizer.score_videos(find_videos([tmp_path], TEMPLATE))
    assert video.error == (
        f"{tmp_path}: holds neither frames nor videos; frames are files like {TEMPLATE} (data.image_tmpl)"
    )


def test_frames_of_another_name_are_an_error_that_says_what_to_set(checkpoint, motion_root, tmp_path):
    folder, frames = tmp_path / "renamed", sorted((motion_root / "frames" / "val_00001").iterdir())
    folder.mkdir()
    for number, frame in enumerate(frames):
        (folder / f"frame{number:04d}.jpg").symlink_to(frame)
    recognizer = Recognizer.load(checkpoint)
    with pytest.raises(DataError, match=r"like frame0000.jpg, but .*; set data.image_tmpl=frame\{:04d\}.jpg$"):
        recognizer.predict(folder)
    with pytest.raises(DataError, match="number 0, but data.index_base is 1; set data.index_base=0"):
        Recognizer.load(checkpoint, overrides=["data.image_tmpl=frame{:04d}.jpg"]).predict(folder)
    right = Recognizer.load(checkpoint, overrides=["data.image_tmpl=frame{:04d}.jpg", "data.index_base=0"])
    assert right.predict(folder) == recognizer.predict(motion_root / "frames" / "val_00001")
    (folder / "frame0002.jpg").unlink()
    with pytest.raises(DataError, match="renamed: frames are missing or twice there before frame0003.jpg"):
        right.predict(folder)


@pytest.mark.parametrize(
    "name, template",
    [
        ("img_00001.jpg", TEMPLATE),
        ("1.png", "{:d}.png"),
        ("v2_cam{1}_0012_x.jpg", "v2_cam{{1}}_{:04d}_x.jpg"),
        ("cover.jpg", None),
    ],
)
def test_a_template_is_told_from_a_file_name(name, template):
    assert template_of(name) == template
    if template:
        assert template.format(int("".join(filter(str.isdigit, name.split("_")[-2 if "_x" in name else -1])))) == name


def test_lists_may_have_labels_numbers_of_frames_and_spaces(tmp_path):
    touch(tmp_path, "data/a.mp4", "data/b 3.mp4", "data/c 4", f"data/d/{TEMPLATE.format(1)}")
    list_path = tmp_path / "data" / "list.txt"
    list_path.write_text("a.mp4\nb 3.mp4 7\n\nc 4\nd 12 -1\ngone.mp4 5\n")
    records = find_videos([list_path], TEMPLATE)
    assert [os.path.relpath(record.path, tmp_path / "data") for record in records] == [
        *("a.mp4", "b 3.mp4", "c 4", "d", "gone.mp4 5")
    ]
    assert [(record.num_frames, record.label) for record in records[:4]] == [
        (None, -1),
        (None, 7),
        (None, -1),
        (12, -1),
    ]
    assert records[3].source == f"{list_path}:5"
    list_path.rename(tmp_path / "list.txt")
    again = find_videos([tmp_path / "list.txt"], TEMPLATE, root=tmp_path / "data")
    assert [record.path for record in again] == [record.path for record in records]
    (tmp_path / "list.txt").write_text("d 0 3\n")
    with pytest.raises(DataError, match="list.txt:1: num_frames must be at least 1, got 0"):
        find_videos([tmp_path / "list.txt"], TEMPLATE, root=tmp_path / "data")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match="list.txt: the list is empty"):
        find_videos([tmp_path / "list.txt"], TEMPLATE)


# the door for other programs


PROGRAM = """
import sys
import datasets, torch
theirs = datasets
model = torch.hub.load(sys.argv[1], "side4video", source="local", checkpoint=sys.argv[2])
print(model.predict(sys.argv[3], topk=1)[0][0])
print(len(list(model.features(sys.argv[3], tokens=True))), model.features(sys.argv[3]).shape, len(model.class_names))
other = torch.hub.load(sys.argv[1], "side4video", source="local", checkpoint=sys.argv[2], workers=1)
print(other.predict(sys.argv[3]) == model.predict(sys.argv[3]))
print(sys.modules["datasets"] is theirs)
import datasets.load
print(datasets.load.WHO, "utils" in sys.modules, sys.argv[1] in sys.path)
"""


def test_hub_loads_it_into_a_program_elsewhere_that_has_a_package_called_datasets(
    checkpoint, recognizer, video, tmp_path
):
    touch(tmp_path, "elsewhere/datasets/__init__.py")
    (tmp_path / "elsewhere" / "datasets" / "load.py").write_text("WHO = 'theirs'")
    (tmp_path / "elsewhere" / "program.py").write_text(PROGRAM)
    arguments = [str(REPOSITORY), str(checkpoint), str(video)]
    done = subprocess.run(
        [sys.executable, "program.py", *arguments], cwd=tmp_path / "elsewhere", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    name = recognizer.predict(video, topk=1)[0][0]
    assert done.stdout.splitlines() == [name, "4 (64,) 10", "True", "True", "theirs False False"]
