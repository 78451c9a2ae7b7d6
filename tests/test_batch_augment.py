"""RandAugment, grayscale, erasing and mixup: one draw per clip, timm's distributions, undisturbed global generators."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    assert_equal_batches,
    epoch_batches,
    loader_config,
    make_frames,
    pixel_batch,
    plain_clip,
    tiny_config,
    train_clip,
    train_steps,
    train_transform,
)

from datasets.batch_augment import BatchAugment
from datasets.flips import flip_pairs
from datasets.loaders import build_train_loader
from datasets.rand_augment import draw_operations, grayscale
from datasets.transforms import draw_crop, normalize_clips
from modules import build_model
from utils.seeding import seed_everything

CPU = torch.device("cpu")


def global_states():
    return random.getstate(), tuple(map(str, np.random.get_state())), tuple(torch.get_rng_state().tolist())


# RandAugment of clips (test_rand_augment.py tests the operations)


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
def test_equal_frames_stay_equal_under_training_augmentation(protocol):
    frames, size = make_frames(1) * 3, 16
    plain, full = (train_transform(protocol, size, {}, rand_aug) for rand_aug in (False, True))
    changed = 0
    for seed in range(60):
        clip, _ = train_clip(full, frames, 0, np.random.default_rng(seed))
        assert clip.shape == (3, 3, size, size) and clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()
        changed += not torch.equal(clip, train_clip(plain, frames, 0, np.random.default_rng(seed))[0])
    assert changed > 50


@pytest.mark.parametrize("protocol", ["kinetics", "something"])
def test_the_steps_come_in_the_order_of_the_protocol_and_the_label_follows_the_flip(protocol):
    names = ["Pulling something from left to right", "Pulling something from right to left", "Dropping something"]
    transform = train_transform(protocol, 32, flip_pairs(protocol, 3, names), rand_aug=True)
    frames, seen, apart = make_frames(2), set(), []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        draw_operations(int(rng.integers(2**32)))
        draw_crop(*((44, 32) if protocol == "kinetics" else (320, 256)), 32, rng)
        flip = bool(rng.random() < 0.5)
        gray = bool(rng.random() < 0.2 and protocol == "kinetics")
        for label, mirrored in enumerate((1, 0, 2)):
            clip, out = train_clip(transform, frames, label, np.random.default_rng(seed))
            assert out == (mirrored if flip else label)
        expected, _ = plain_clip(frames, 0, seed, protocol, 32, {}, rand_aug=True)
        difference = np.abs(clip.permute(0, 2, 3, 1).numpy() - expected)
        assert (difference > 3).mean() < 0.02 and difference.mean() < 1
        apart.append(difference.mean())
        seen.add((flip, gray))
    assert np.mean(apart) < 0.4
    assert len(seen) == (4 if protocol == "kinetics" else 2)


def test_a_training_clip_leaves_the_global_generators_alone(monkeypatch):
    before = global_states()
    train_clip(train_transform("kinetics", 16, {}, True), make_frames(2), 0, np.random.default_rng(0))
    assert global_states() == before

    def broken(drawn):
        random.random(), np.random.random()
        raise OSError

    monkeypatch.setattr("datasets.rand_augment.RAND_AUGMENT", broken)
    with pytest.raises(OSError):
        draw_operations(0)
    assert global_states() == before


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_change_no_augmented_batch(make_frame_folders):
    paths = make_frame_folders([9] * 8, size=(20, 16))
    settings = {"num_sample": 2, "rand_aug": True, "dataset": "kinetics"}
    alone, three = (build_train_loader(loader_config(paths, workers=count, **settings)) for count in (0, 3))
    for epoch in (0, 1):
        batches = epoch_batches(alone, epoch)
        np.random.seed(epoch), random.seed(epoch)  # the state of the global generators must not matter
        assert_equal_batches(batches, epoch_batches(three, epoch))
    plain = epoch_batches(build_train_loader(loader_config(paths, **settings | {"rand_aug": False})), 1)
    assert not any(torch.equal(a["clips"], b["clips"]) for a, b in zip(plain, batches, strict=True))


# Grayscale


def test_grayscale_equals_that_of_pillow():
    values = np.array([0, 1, 2, 63, 64, 76, 127, 128, 129, 149, 191, 200, 254, 255], dtype=np.uint8)
    colours = np.stack(np.meshgrid(values, values, values), -1).reshape(1, -1, 3)
    noise = np.random.default_rng(0).integers(0, 256, size=(300, colours.shape[1], 3), dtype=np.uint8)
    frames = np.stack([noise, np.concatenate([colours] * 300)])
    clip = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
    grayscale(clip)
    for gray, frame in zip(clip, frames, strict=True):
        assert np.array_equal(gray.transpose(1, 2, 0), Image.fromarray(frame).convert("L").convert("RGB"))


@pytest.mark.parametrize(("protocol", "low", "high"), [("kinetics", 0.17, 0.23), ("something", 0, 0)])
def test_a_clip_is_gray_with_the_probability_of_its_protocol(protocol, low, high, monkeypatch):
    frames, transform = make_frames(2, (10, 8)), train_transform(protocol, 8, {})
    monkeypatch.setattr("datasets.transforms.resize_size", lambda *_: (10, 8))  # 320 x 256 would be slow
    rng, gray = np.random.default_rng(0), []
    for _ in range(2000):
        clip, _ = train_clip(transform, frames, 0, rng)
        per_frame = (clip == clip[:, :1]).flatten(1).all(1)
        assert per_frame[0] == per_frame[1]
        gray.append(per_frame[0].item())
    assert low <= np.mean(gray) <= high


# Erasing


def erased(key, clips=8, frames=3, size=16, value=7.0):
    """Clips of one value after erasing, float32 (B, T, 3, H, W), and a mask of the erased pixels, bool."""
    torch.manual_seed(0)
    result, _ = BatchAugment(5, 0.1, True, False, CPU)(
        torch.full((clips, frames, 3, size, size), value), torch.zeros(clips, dtype=torch.int64), *key
    )
    return result, result != value


def test_a_quarter_of_the_clips_lose_one_box_to_noise_that_differs_in_every_pixel_and_frame():
    clips, gone = erased((0, 0), clips=2000, size=12)
    assert 0.22 < gone.flatten(1).any(1).float().mean() < 0.28
    noise = clips[gone]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02 and len(noise.unique()) > 0.98 * len(noise)
    areas = []
    for mask in gone[gone.flatten(1).any(1)]:
        assert (mask == mask[0, 0]).all()  # the same pixels in all frames and channels
        rows, columns = mask[0, 0].any(1), mask[0, 0].any(0)
        assert torch.equal(mask[0, 0], rows[:, None] & columns)  # they form a box
        for side in (rows, columns):
            assert side.diff().sum() <= 2  # without gaps
        areas.append(mask[0, 0].float().mean().item())
    assert 0 < min(areas) < 0.03 and 0.27 < max(areas) < 0.4 and len(set(areas)) > 10


def test_boxes_are_a_function_of_the_key():
    boxes = {key: erased(key)[1] for key in [(5, 0, 0, 0), (6, 0, 0, 0), (5, 1, 0, 0), (5, 0, 1, 0), (5, 0, 0, 1)]}
    for key, gone in boxes.items():
        assert torch.equal(gone, erased(key)[1])
        assert sum(torch.equal(gone, other) for other in boxes.values()) == 1


# Mixup and cutmix


def mix(key, values=(0.0, 1.0, 3.0, 7.0), size=24):
    """Clips (B, 2, 3, H, W) of one value each, with labels 3, 2, 1, 0, after mixing, and their targets (B, 5)."""
    clips = torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 2, 3, size, size).contiguous()
    return BatchAugment(5, 0.1, False, True, CPU)(clips, torch.tensor([3, 2, 1, 0]), *key)


def test_targets_mix_the_labels_in_the_proportion_of_the_pixels():
    values, labels = (0.0, 1.0, 3.0, 7.0), (3, 2, 1, 0)
    lambdas = {"mixup": [], "cutmix": []}
    for key in range(300):
        clips, targets = mix((key,))
        assert clips.shape == (4, 2, 3, 24, 24) and targets.shape == (4, 5)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        cut = torch.isin(clips, torch.tensor(values)).all()
        of_clip = []
        for i, (value, partner) in enumerate(zip(values, values[::-1], strict=True)):
            own = (clips[i] - partner) / (value - partner)  # the share of the clip itself in each pixel
            assert (own == own[0, 0]).all()  # the same in all frames and channels
            if cut:
                other = own[0, 0] == 0
                assert torch.equal(other, other.any(1)[:, None] & other.any(0))
            else:
                assert own.max() - own.min() < 1e-5
            expected = torch.full((5,), 0.1 / 5)
            expected[labels[i]] += 0.9 * own.mean()
            expected[labels[3 - i]] += 0.9 * (1 - own.mean())
            torch.testing.assert_close(targets[i], expected, atol=1e-5, rtol=0)
            of_clip.append(own.mean().item())
        assert np.ptp(of_clip) < 1e-5
        lambdas["cutmix" if cut else "mixup"].append(of_clip[0])
    assert 120 < len(lambdas["mixup"]) < 180
    # Boxes are clipped at the frame's edge, so cutmix exchanges less than its lambda says.
    assert abs(np.mean(lambdas["mixup"]) - 0.5) < 0.07 and np.mean(lambdas["cutmix"]) > 0.5
    assert all(np.ptp(values) > 0.9 for values in lambdas.values())


def test_mixup_has_the_parameters_of_the_protocol():
    mixup = BatchAugment(5, 0.1, False, True, CPU).mix
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.switch_prob, mixup.mix_prob) == (0.8, 1.0, 0.5, 1.0)
    assert mixup.mode == "batch" and mixup.correct_lam and mixup.cutmix_minmax is None


def test_mixing_is_a_function_of_the_key_and_leaves_the_global_generators_alone():
    seed_everything(1)
    before = global_states()
    keys = [(5, 0, 0, 0), (6, 0, 0, 0), (5, 1, 0, 0), (5, 0, 1, 0), (5, 0, 0, 1)]
    results = [mix(key) for key in keys]
    for key, (clips, targets) in zip(keys, results, strict=True):
        again = mix(key)
        assert torch.equal(clips, again[0]) and torch.equal(targets, again[1])
    assert len({tuple(clips.flatten().tolist()) for clips, _ in results}) == len(keys)
    assert global_states() == before


def test_erasing_comes_before_mixing():
    labels = torch.tensor([0, 1])
    key = next(key for key in range(100) if erased((key,), clips=2)[1].flatten(1).any(1).all())
    noisy, _ = erased((key,), clips=2)
    expected, _ = BatchAugment(5, 0.1, False, True, CPU)(noisy, labels, key)
    torch.manual_seed(0)
    clips, _ = BatchAugment(5, 0.1, True, True, CPU)(torch.full((2, 3, 3, 16, 16), 7.0), labels, key)
    assert torch.equal(clips, expected)


def test_without_augmentation_clips_stay_and_targets_are_smoothed_labels():
    clips = torch.randn(3, 2, 3, 4, 4)
    result, targets = BatchAugment(4, 0.2, False, False, CPU)(clips.clone(), torch.tensor([0, 3, 3]), 0)
    assert torch.equal(result, clips)
    rows = [[0.85, 0.05, 0.05, 0.05]] + 2 * [[0.05, 0.05, 0.05, 0.85]]
    torch.testing.assert_close(targets, torch.tensor(rows))


# The training step


def test_the_loss_of_mixed_clips_is_cross_entropy_with_their_soft_targets():
    _, loss = train_steps([pixel_batch(1)], 1, mixup=True)
    torch.manual_seed(0)
    config = tiny_config()
    fresh = build_model(config).train()
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    seed, epoch, iteration, process = 0, 0, 0, 0
    clips, targets = BatchAugment(5, 0.1, False, True, CPU)(
        normalize_clips(pixel_batch(1)["clips"], mean, std), pixel_batch(1)["labels"], seed, epoch, iteration, process
    )
    assert loss == pytest.approx(-(targets * fresh(clips).log_softmax(-1)).sum(-1).mean().item(), rel=1e-4)
