"""Imbalance: data.balance, solver.class_weights, data.min_frames, and classes without a training video."""

from collections import Counter

import numpy as np
import pytest
import torch
from tiny import assert_equal_batches, epoch_batches, loader_config, pixel_batch, train_run, train_steps, write_video

from datasets.batch_augment import BatchAugment
from datasets.loaders import build_eval_loader, build_train_loader
from engine.class_weights import balanced_weights, class_weights, describe_balance, expected_counts, weighted_targets
from engine.configuration import default_config
from engine.training_state import changed_values
from utils.errors import ConfigError, DataError
from utils.seeding import balanced_order

CPU = torch.device("cpu")
LABELS = np.array([0, 0, 0, 0, 0, 0, 2, 2, 3])  # class 1 has no video


def places(batches):
    return [batch["indices"].item() for batch in batches]


def write_list(tmp_path, labels, frames=30):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"video {number} {frames} {label}\n" for number, label in enumerate(labels)))
    return str(path)


# The order


def test_classes_are_equally_frequent_from_the_start_of_an_epoch_to_any_place():
    """Nine draws from three classes are three of each: half of class 0, and class 3's only video three times."""
    for epoch in range(20):
        order = balanced_order(5, epoch, LABELS)
        assert np.bincount(LABELS[order]).tolist() == [3, 0, 3, 3]
        assert len(set(order[LABELS[order] == 0])) == 3
        assert sorted(np.bincount(order, minlength=9)[6:]) == [1, 2, 3]
        for length in range(1, 10):
            counts = np.bincount(LABELS[order[:length]], minlength=4)[[0, 2, 3]]
            assert counts.max() - counts.min() <= 1
        assert np.array_equal(order, balanced_order(5, epoch, LABELS))
    orders = [balanced_order(seed, epoch, LABELS).tolist() for seed in (5, 6) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_a_large_class_gives_its_other_videos_in_the_next_epoch():
    """Class 0 has six videos and three draws an epoch, so two epochs have each of them once."""
    for epoch in (0, 2, 4):
        drawn = np.concatenate([balanced_order(5, epoch + e, LABELS) for e in (0, 1)])
        assert sorted(drawn[LABELS[drawn] == 0]) == [0, 1, 2, 3, 4, 5]
    halves = {frozenset(order[LABELS[order] == 0]) for order in (balanced_order(s, 0, LABELS) for s in range(20))}
    assert len(halves) > 2  # which videos come first depends on the seed


def test_the_last_round_is_cut_off_where_classes_do_not_divide_the_epoch():
    """Five draws from three classes: one round, and two classes of the next."""
    labels = np.array([4, 4, 4, 1, 0])
    for epoch in range(10):
        assert sorted(Counter(labels[balanced_order(0, epoch, labels)].tolist()).values()) == [1, 2, 2]
    assert sorted(balanced_order(0, 3, np.zeros(7, int))) == list(range(7))  # one class alone


def test_balance_gives_each_time_another_clip_and_no_process_or_worker_changes_it(make_frame_folders, tmp_path):
    root, _ = make_frame_folders([30] * 8)
    paths = root, write_list(tmp_path, [0] * 7 + [1])
    config = loader_config(paths, num_classes=2, balance=True, batch_size=1)
    batches = epoch_batches(build_train_loader(config), 0)
    assert places(batches).count(7) == 4 and len(set(places(batches))) == 5
    clips = [batch["clips"] for batch in batches if batch["indices"].item() == 7]
    assert not any(torch.equal(a, b) for number, a in enumerate(clips) for b in clips[:number])
    ranks = [epoch_batches(build_train_loader(config, rank, 2), 0) for rank in (0, 1)]
    assert_equal_batches([batch for pair in zip(*ranks, strict=True) for batch in pair], batches)
    config.data.workers = 2
    assert_equal_batches(epoch_batches(build_train_loader(config), 0), batches)


@pytest.mark.parametrize("world", [1, 2])
def test_a_balanced_epoch_goes_on_in_its_middle_with_the_same_batches(make_frame_folders, tmp_path, world):
    root, _ = make_frame_folders([30] * 12)
    config = loader_config((root, write_list(tmp_path, [0] * 10 + [1, 3])), accumulation=2, balance=True, batch_size=1)
    for rank in range(world):
        loader = build_train_loader(config, rank, world)
        whole = epoch_batches(loader, 3)
        assert len(whole) == 12 // world
        loader.sampler.set_epoch(3, start=2)
        assert_equal_batches(list(loader), whole[2:])


def test_balanced_training_that_is_resumed_gives_the_weights_of_an_unbroken_one(config, tmp_path):
    options = ["data.balance=True", "solver.class_weights=[1,2,1,1,1,1,1,1,1,1]"]
    more = ["solver.lr_warmup_step=0", "solver.type=multistep", "solver.lr_decay_step=9"]
    train_run(config, tmp_path / "first", *options, *more, "solver.epochs=1")
    whole = train_run(config, tmp_path / "whole", *options, *more)
    resumed = train_run(config, tmp_path / "first", *options, *more, "resume=auto")
    assert all(torch.equal(whole["trained"][name], resumed["trained"][name]) for name in whole["trained"])
    with pytest.raises(ConfigError, match="data.balance was True and is False now"):
        train_run(config, tmp_path / "whole", *options[1:], *more, "resume=auto", "solver.epochs=3")


def test_a_video_that_cannot_be_read_is_replaced_by_one_of_its_class(make_frame_folders, tmp_path):
    root, _ = make_frame_folders([4] * 6)
    config = loader_config((root, write_list(tmp_path, [0, 0, 0, 0, 1, 1], 4)), balance=True, batch_size=1)
    (tmp_path / "frames" / "video 4").rename(tmp_path / "gone")
    config.data.on_error = "skip"
    loader = build_train_loader(config)
    batches = epoch_batches(loader, 0)
    assert places(batches).count(5) == 3 and 4 not in places(batches)
    assert {index for index, _ in loader.unreadable} == {4}
    clips = [batch["clips"] for batch in batches if batch["indices"].item() == 5]
    assert not any(torch.equal(clips[0], clip) for clip in clips[1:])
    (tmp_path / "frames" / "video 5").rename(tmp_path / "gone too")  # then any other class, and the run goes on
    assert set(places(epoch_batches(loader, 1))) <= {0, 1, 2, 3}


# Weights


def test_balanced_weights_are_inverse_to_the_number_of_videos():
    """Three videos of class 0, one of class 2, none of class 1: 4 / (2 x 3) = 2/3, 0, and 4 / (2 x 1) = 2."""
    weights = balanced_weights(np.array([3.0, 0, 1]))
    assert weights == pytest.approx([2 / 3, 0, 2])
    assert np.mean([weights[label] for label in (0, 2, 0, 0)]) == pytest.approx(1)


def test_balanced_weights_count_a_flipped_label_as_flips_make_it(make_frame_folders, tmp_path):
    """Labels 0 0 0 1 2: a flip makes half of "go left" "go right", so both have (3 + 1) / 2 = 2, "up" has 1 of 5.

    Weights: 5 / (3 x 2) = 5/6 twice, and 5 / (3 x 1) = 5/3; class 3 has no video.
    """
    root, _ = make_frame_folders([2] * 5)
    (tmp_path / "names.csv").write_text("id,name\n0,go left\n1,go right\n2,up\n3,down\n")
    data = {"label_list": str(tmp_path / "names.csv"), "batch_size": 1}
    config = loader_config((root, write_list(tmp_path, [0, 0, 0, 1, 2], 2)), **data)
    assert class_weights(config, build_train_loader(config), CPU) is None
    config.solver.class_weights = "balanced"
    loader = build_train_loader(config)
    assert expected_counts(loader.dataset, 4).tolist() == [2, 2, 1, 0]
    assert class_weights(config, loader, CPU).tolist() == pytest.approx([5 / 6, 5 / 6, 5 / 3, 0])
    assert describe_balance(config, loader.dataset) == [
        "class weights: balanced, from 0.8333 to 1.667; 0 for 1 classes"
    ]
    config.data.flip = False  # three, one, one
    weights = class_weights(config, build_train_loader(config), CPU)
    assert weights.tolist() == pytest.approx([5 / 9, 5 / 3, 5 / 3, 0])


def test_the_loss_of_a_mixed_clip_is_the_sum_of_its_classes_losses():
    """Slow and plain: share x weight x smoothed cross entropy of each class, for each clip by itself."""
    generator = torch.Generator().manual_seed(0)
    logits, weights, smoothing = torch.randn(3, 4, generator=generator), torch.tensor([0.5, 0, 3, 7]), 0.1
    shares = torch.tensor([[1, 0, 0, 0], [0.25, 0, 0.75, 0], [0, 0.6, 0, 0.4]])
    losses = []
    for row, mixture in zip(logits, shares, strict=True):
        logs = row.log_softmax(0)
        own = [-(0.9 * logs[k] + 0.1 / 4 * logs.sum()) for k in range(4)]
        losses.append(sum(mixture[k] * weights[k] * own[k] for k in range(4)))
    targets = weighted_targets(0.9 * shares + 0.1 / 4, weights, smoothing)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert loss.item() == pytest.approx(float(sum(losses)) / 3, rel=1e-5)
    assert targets.sum(1).tolist() == pytest.approx([0.5, 2.375, 2.8], rel=1e-5)  # 0.125 + 2.25, and 0.4 x 7


def test_values_of_a_weighted_target_by_hand():
    """Two classes, smoothing 0.2, weights 3 and 1: clips of class 0 and 1 have 3 (0.9, 0.1) and (0.1, 0.9)."""
    _, targets = BatchAugment(2, 0.2, False, False, CPU)(torch.zeros(2, 1, 3, 2, 2), torch.tensor([0, 1]), 0)
    result = weighted_targets(targets, torch.tensor([3.0, 1.0]), 0.2)
    assert result.flatten().tolist() == pytest.approx([2.7, 0.3, 0.1, 0.9], rel=1e-5)


@pytest.mark.parametrize("mixup", [False, True])
def test_the_weights_of_the_configuration_reach_the_loss_of_training(mixup):
    """A model at its first step: equal weights scale the loss, and a weight of 0 removes a class from it."""
    plain = train_steps([pixel_batch(1)], 1, mixup=mixup)[1]
    assert train_steps([pixel_batch(1)], 1, mixup=mixup, class_weights=[3] * 5)[1] == pytest.approx(3 * plain, rel=1e-5)
    label = pixel_batch(1)["labels"].tolist()
    without = [0.0 if k in label else 1.0 for k in range(5)]
    assert train_steps([pixel_batch(1)], 1, mixup=mixup, class_weights=without)[1] == pytest.approx(0, abs=1e-5)


def test_accumulated_batches_of_one_class_each_give_the_gradient_of_one_batch():
    """The mean of weighted losses is not divided by the weights of its batch."""
    labels = torch.tensor([0, 0, 4, 4])
    weights = torch.tensor([1.0, 1, 1, 1, 9])
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    targets = torch.nn.functional.one_hot(labels, 5).float()

    def loss(part):
        return torch.nn.functional.cross_entropy(logits[part], weighted_targets(targets[part], weights, 0.0))

    assert loss(slice(0, 4)).item() == pytest.approx((loss(slice(0, 2)) + loss(slice(2, 4))).item() / 2, rel=1e-6)


@pytest.mark.parametrize("weights", [[1, 2], [0] * 5, [1, 1, 1, 1, -1], [1, 1, 1, 1, "x"], "even", 2])
def test_other_weights_are_errors_of_the_key(weights):
    with pytest.raises(ConfigError, match=r"solver.class_weights: (is|has)"):
        default_config(solver={"class_weights": weights})


def test_classes_are_not_balanced_twice():
    with pytest.raises(ConfigError, match="solver.class_weights: balanced, but data.balance"):
        default_config(data={"balance": True}, solver={"class_weights": "balanced"})
    default_config(data={"balance": True}, solver={"class_weights": [1, 1, 1, 1, 2]})


def test_a_key_that_is_younger_than_the_checkpoint_is_no_change_at_its_default():
    new = default_config().toDict()
    old = default_config().toDict()
    del old["data"]["balance"], old["data"]["min_frames"], old["solver"]["class_weights"]
    assert changed_values(old, new) == []
    new["data"]["min_frames"] = 8
    assert changed_values(old, new) == [("data.min_frames", 1, 8)]


# Short videos and absent classes


def test_short_videos_are_left_out_of_training_and_validation_and_counted(make_frame_folders, caplog):
    root, list_path = paths = make_frame_folders([3, 7, 8, 9])
    config = loader_config(paths, min_frames=8)
    with caplog.at_level("INFO"):
        train, val = build_train_loader(config), build_eval_loader(config)
    assert [[r.num_frames for r in loader.dataset.records] for loader in (train, val)] == [[8, 9], [8, 9]]
    line = f"{list_path}: 2 of 4 videos left out, which have fewer frames than data.min_frames 8"
    assert caplog.messages.count(line) == 2
    assert len(build_eval_loader(config, every_video=True).dataset) == 4
    config.data.min_frames = 10
    with pytest.raises(DataError, match="none of its 4 videos has data.min_frames 10"):
        build_eval_loader(config)


def test_frames_that_are_counted_are_compared_instead_of_the_lists(make_frame_folders, tmp_path):
    root, _ = make_frame_folders([3, 9, 9])
    config = loader_config((root, write_list(tmp_path, [0, 1, 2], 8)), min_frames=8, batch_size=1)
    assert len(build_train_loader(config).dataset) == 3
    config.data.count_frames = True
    assert [record.label for record in build_train_loader(config).dataset.records] == [1, 2]


def test_video_files_are_opened_to_count_their_frames_and_broken_ones_are_left_to_the_reader(tmp_path):
    for number, count in enumerate([5, 9, 12]):
        write_video(tmp_path / f"{number}.mp4", number, count)
    (tmp_path / "3.mp4").write_bytes(b"no video")
    (tmp_path / "list.txt").write_text("".join(f"{number}.mp4 {number}\n" for number in range(4)))
    paths = str(tmp_path), str(tmp_path / "list.txt")
    config = loader_config(paths, modality="video", decoder="pyav", min_frames=9, batch_size=1)
    assert [record.path for record in build_eval_loader(config).dataset.records] == ["1.mp4", "2.mp4", "3.mp4"]


def test_classes_without_a_training_video_are_named(make_frame_folders, tmp_path, caplog):
    root, list_path = make_frame_folders([3, 9, 9], num_classes=3)
    (tmp_path / "names.csv").write_text("id,name\n0,jump\n1,run\n2,walk\n3,fall\n")
    config = loader_config((root, list_path), label_list=str(tmp_path / "names.csv"), min_frames=4, batch_size=1)
    build_train_loader(config)
    assert f"{list_path}: 2 of 4 classes have no training video: jump, fall" in caplog.messages
    caplog.clear()
    config.data.label_list, config.data.num_classes = None, 203
    build_train_loader(config)
    assert caplog.messages[-1].endswith("class 100, class 101, and 101 more")
    caplog.clear()
    config.data.num_classes, config.data.min_frames = 3, 1
    build_train_loader(config)
    assert "no training video" not in caplog.text
