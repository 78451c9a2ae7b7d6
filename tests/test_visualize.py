"""Where the side network looks: on the moving object, and what tools/visualize.py draws of it."""

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_untrained, write_video

from inference import Recognizer
from inference.inputs import given_videos
from inference.looking import focus, look
from modules.side_network import FrameAttention
from tools import visualize
from tools.motion_demo import CLASSES, object_masks, render_video
from utils.errors import ConfigError, DataError, UserError


def test_masks_are_where_the_objects_are_drawn():
    for label in (0, 8):
        frames = render_video(label, np.random.default_rng(3), 64, 4).astype(int)
        masks = object_masks(label, np.random.default_rng(3), 64, 4)
        assert masks.shape == (4, 64, 64) and 0.1 < masks.mean() < 0.6
        # The ground is dark, at most 0.3 and its noise; objects are bright.
        assert frames.mean(axis=-1)[masks].mean() > 130 > 90 > frames.mean(axis=-1)[~masks].mean()


def test_attention_weights_give_what_attention_gives():
    torch.manual_seed(0)
    attention, tokens = FrameAttention(128), torch.randn(2, 3, 1 + 6, 128)
    weights = attention.weights(tokens)
    assert weights.shape == (2, 3, 2, 6, 7) and torch.allclose(weights.sum(-1), torch.ones(2, 3, 2, 6))
    value = attention.qkv(tokens)[..., 256:].unflatten(-1, (2, 64)).transpose(2, 3)  # (B, T, heads, 1 + N, 64)
    by_hand = attention.proj((weights @ value).transpose(2, 3).flatten(3))
    assert torch.allclose(by_hand, attention(tokens), atol=1e-5)


def test_focus_is_the_share_of_weight_against_the_share_of_area():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, :4, :4] = True
    weights = np.ones((1, 2, 2))
    assert focus(weights, mask) == 1
    weights[0, 0, 0] = 5
    assert focus(weights, mask) == pytest.approx(5 / 8 / 0.25)


def test_the_map_follows_the_moving_object(trained_demo):
    checkpoint, root = trained_demo
    recognizer = Recognizer.load(checkpoint)
    ratios, attended, others, right = [], [], [], 0
    for number in range(20):
        label = number % 10
        found = look(recognizer, given_videos([root / "frames" / f"val_{number:05d}"])[0])
        masks = object_masks(label, np.random.default_rng([0, 1, number]), 32, 8)[found.frames]
        elsewhere = object_masks(label, np.random.default_rng([0, 1, number + 20]), 32, 8)[found.frames]
        ratios.append(focus(found.gradient, masks))
        attended.append(focus(found.attention, masks))
        others.append(focus(found.gradient, elsewhere))
        right += found.label == label
    assert right >= 16  # else the maps say nothing
    # Objects cover a fifth of the pixels. The map also has their edges, of which a part is ground.
    assert np.mean(ratios) > 1.7 and min(ratios) > 1 and np.mean(attended) > 1.5
    assert 0.7 < np.mean(others) < 1.3  # where objects of other videos are


def test_a_look_leaves_the_model_as_it_was_and_sees_what_it_scores(trained_demo):
    checkpoint, root = trained_demo
    recognizer = Recognizer.load(checkpoint)
    side = recognizer.model.trained.side
    (record,) = given_videos([root / "frames" / "val_00003"])
    before = recognizer.scores([record.path])
    found = look(recognizer, record, label=7)
    assert found.label == 7 and found.scores == pytest.approx(before[0], abs=1e-5)
    assert side.recompute and all(p.grad is None for p in recognizer.model.parameters())
    assert not side.blocks[-1].attn._forward_pre_hooks and not side.stem_bn._forward_hooks
    assert np.array_equal(recognizer.scores([record.path]), before)
    assert found.frames == [0, 1, 2, 4, 5, 6]
    for frame, pixels in zip(found.frames, found.pixels, strict=True):
        with Image.open(root / "frames" / "val_00003" / f"img_{frame + 1:05d}.jpg") as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert found.gradient.shape == found.attention.shape == (6, 8, 8) and (found.gradient >= 0).all()
    assert (found.attention.sum(axis=(1, 2)) < 1.00001).all() and (found.attention > 0).all()


@pytest.fixture
def checkpoint(config, tmp_path):
    save_untrained(config, tmp_path / "m.pt")
    return str(tmp_path / "m.pt")


def test_a_strip_and_a_video_are_written(checkpoint, motion_root, tmp_path, capsys):
    video = str(motion_root / "frames" / "val_00001")
    visualize.main([checkpoint, video, str(tmp_path / "new" / "look.png"), "--class", "growing"])
    out = capsys.readouterr().out
    assert f"{video}: growing: " in out and sorted(p.name for p in (tmp_path / "new").iterdir()) == [
        "look.mp4", "look.png"
    ]  # fmt: skip
    with Image.open(tmp_path / "new" / "look.png") as image:
        assert image.size == (4 * 160 + 3 * 3, 44 + 3 * 182)
        first = np.asarray(image)[44:204, :160].astype(int)
    with Image.open(motion_root / "frames" / "val_00001" / "img_00001.jpg") as image:
        assert np.abs(np.asarray(image.resize((160, 160), Image.Resampling.BICUBIC)).astype(int) - first).max() <= 2
    with av.open(str(tmp_path / "new" / "look.mp4")) as container:
        assert [(frame.width, frame.height) for frame in container.decode(video=0)] == [(480, 184)] * 4


def test_a_folder_takes_the_name_of_the_video_and_files_are_read_too(checkpoint, tmp_path):
    write_video(tmp_path / "clip.v1.mp4", count=9)
    (tmp_path / "out").mkdir()
    visualize.main([checkpoint, str(tmp_path / "clip.v1.mp4"), str(tmp_path / "out"), "--set", "data.num_segments=12"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.v1.mp4", "clip.v1.png"]
    with Image.open(tmp_path / "out" / "clip.v1.png") as image:
        assert image.width == 8 * 160 + 7 * 3  # eight of twelve frames


def test_what_cannot_be_drawn_is_refused_and_leaves_nothing(checkpoint, motion_root, tmp_path):
    video, out = str(motion_root / "frames" / "val_00000"), tmp_path / "out"
    with pytest.raises(ConfigError, match=f"--class jumping: no class of the model; {len(CLASSES)} classes"):
        visualize.main([checkpoint, video, str(out / "x"), "--class", "jumping"])
    with pytest.raises(UserError, match="frames: holds 23 videos; name one"):
        visualize.main([checkpoint, str(motion_root / "frames"), str(out / "x")])
    with pytest.raises(DataError, match="gone.mp4: no such file"):
        visualize.main([checkpoint, str(tmp_path / "gone.mp4"), str(out / "x")])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file/x.png: cannot be written"):
        visualize.main([checkpoint, video, str(tmp_path / "file" / "x")])
    assert not out.exists()
