"""Loaders: order and share of the videos, batches, replaced and missing videos, keys of the configuration."""

import os
import signal
import time

import pytest
import torch
from tiny import assert_equal_batches, epoch_batches, loader_config

from datasets.loaders import WorkerLostError, build_eval_loader, build_train_loader, naming_lost_workers
from datasets.transforms import protocol_resize
from utils.errors import ConfigError, DataError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def indices(batches):
    return [index for batch in batches for index in batch["indices"].tolist()]


# Training


def test_workers_change_no_batch(make_frame_folders):
    paths = make_frame_folders([9] * 8, size=(20, 16))
    plain = build_train_loader(loader_config(paths, num_sample=2))
    workers = build_train_loader(loader_config(paths, num_sample=2, workers=3))
    for epoch in (0, 1):
        assert_equal_batches(epoch_batches(plain, epoch), epoch_batches(workers, epoch))


def test_an_epoch_is_repeated_exactly_and_differs_from_the_next(make_frame_folders):
    paths = make_frame_folders([9] * 8)
    loader = build_train_loader(loader_config(paths))
    first, second, again = (epoch_batches(loader, epoch) for epoch in (0, 1, 0))
    assert_equal_batches(first, again)
    assert indices(first) != indices(second)
    assert sorted(indices(first)) == sorted(indices(second)) == list(range(8))
    clips = [{b["indices"][0].item(): b["clips"][0] for b in batches} for batches in (first, second)]
    assert not any(torch.equal(clips[0][index], clips[1][index]) for index in clips[0].keys() & clips[1].keys())


def test_loading_leaves_the_global_generator_alone(make_frame_folders):
    loader = build_train_loader(loader_config(make_frame_folders([9] * 4)))
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_processes_together_use_every_video_once(make_frame_folders):
    paths = make_frame_folders([5] * 8)
    for epoch in (0, 1):
        ranks = [epoch_batches(build_train_loader(loader_config(paths), rank, 2), epoch) for rank in (0, 1)]
        assert [len(batches) for batches in ranks] == [2, 2]
        assert sorted(indices(ranks[0]) + indices(ranks[1])) == list(range(8))


def test_a_sample_does_not_depend_on_the_process_that_loads_it(make_frame_folders):
    paths = make_frame_folders([9] * 4)
    alone = {b["indices"].item(): b["clips"] for b in build_train_loader(loader_config(paths, batch_size=1))}
    shared = build_train_loader(loader_config(paths, batch_size=1), 1, 2)
    assert all(torch.equal(batch["clips"], alone[batch["indices"].item()]) for batch in shared)


@pytest.mark.parametrize(
    ("videos", "batch_size", "world_size", "accumulation", "iterations"),
    [(8, 2, 1, 1, 4), (7, 2, 1, 1, 3), (7, 2, 1, 2, 2), (9, 2, 2, 1, 2), (9, 1, 2, 3, 3), (4, 4, 1, 1, 1)],
)
def test_iterations_are_whole_steps(make_frame_folders, videos, batch_size, world_size, accumulation, iterations):
    config = loader_config(make_frame_folders([2] * videos), accumulation, batch_size=batch_size)
    ranks = [build_train_loader(config, rank, world_size) for rank in range(world_size)]
    assert [len(loader) for loader in ranks] == [iterations] * world_size
    seen = [index for loader in ranks for index in indices(loader)]
    assert len(seen) == len(set(seen)) == iterations * batch_size * world_size


def test_too_few_videos_for_a_step_is_an_error_with_the_numbers(make_frame_folders):
    root, list_path = paths = make_frame_folders([2] * 7)
    with pytest.raises(DataError) as caught:
        build_train_loader(loader_config(paths, accumulation=2), 0, 2)
    assert caught.value.line == (
        f"{list_path}: 7 videos do not fill one step of data.batch_size 2 x 2 processes x "
        "solver.grad_accumulation_steps 2; lower data.batch_size"
    )


def test_repeats_are_next_to_each_other_in_the_batch(make_frame_folders):
    paths = make_frame_folders([1, 1])  # one frame: clips differ by augmentation only
    (batch,) = build_train_loader(loader_config(paths, num_sample=2))
    (single,) = build_train_loader(loader_config(paths))
    assert batch["clips"].shape == (4, 2, 3, 16, 16)
    assert batch["clips"].dtype == torch.uint8
    assert batch["indices"].tolist() == single["indices"].tolist()
    assert batch["labels"].tolist() == [index for index in batch["indices"].tolist() for _ in range(2)]
    assert torch.equal(batch["clips"][0::2], single["clips"])
    assert not torch.equal(batch["clips"][0], batch["clips"][1])


def test_flip_labels_come_from_the_class_names(make_frame_folders, tmp_path):
    paths = make_frame_folders([1] * 4)
    names = tmp_path / "names.csv"
    names.write_text("id,name\n0,go left\n1,go right\n2,up\n3,down\n")
    loader = build_train_loader(loader_config(paths, label_list=str(names)))
    assert loader.dataset.class_names == ["go left", "go right", "up", "down"]
    assert loader.dataset.transform.flip_labels == {0: 1, 1: 0}
    with pytest.raises(ConfigError, match="data.label_list"):
        build_train_loader(loader_config(paths, dataset="something"))


# Custom data sets


@pytest.mark.parametrize(
    "image_tmpl", ["img.jpg", "img_{:05x5}.jpg", "img_{number}.jpg", "img_{", "{}_{}.jpg", "{:s}.jpg"]
)
def test_a_template_that_does_not_take_a_number_is_an_error_of_its_key(make_frame_folders, image_tmpl):
    paths = make_frame_folders([1] * 4)
    with pytest.raises(ConfigError, match="data.image_tmpl: ") as caught:
        build_train_loader(loader_config(paths, image_tmpl=image_tmpl))
    assert repr(image_tmpl) in caught.value.line
    assert "\n" not in caught.value.line


@pytest.mark.parametrize("build", [build_train_loader, build_eval_loader])
def test_the_protocol_follows_the_name_unless_it_is_given(make_frame_folders, build):
    paths = make_frame_folders([1] * 4)
    for dataset, given, protocol in (
        ("tiny", None, "kinetics"),
        ("tiny", "something", "something"),
        ("something", "kinetics", "kinetics"),
    ):
        config = loader_config(paths, dataset=dataset, protocol=given, flip=False)
        dataset = build(config).dataset
        assert config.data.protocol == dataset.protocol == protocol
        assert dataset.transform.resize == protocol_resize(protocol, 16)


@pytest.mark.parametrize("build", [build_train_loader, build_eval_loader])
@pytest.mark.parametrize(("resize", "resolved"), [(None, 16), (24, 24), ([20, 28], [20, 28])])
def test_the_resize_of_the_configuration_reaches_training_and_evaluation(make_frame_folders, build, resize, resolved):
    assert build(loader_config(make_frame_folders([1] * 4), resize=resize)).dataset.transform.resize == resolved


def test_without_flips_neither_pixels_nor_labels_are_mirrored_and_no_class_names_are_needed(make_frame_folders):
    paths = make_frame_folders([3] * 4)
    loader = build_train_loader(loader_config(paths, dataset="something", flip=False))
    assert loader.dataset.transform.flip_labels is None
    for batch in epoch_batches(loader, 0):
        assert batch["labels"].tolist() == batch["indices"].tolist()  # four classes in turn


@pytest.mark.parametrize("count_frames", [False, True])
@pytest.mark.parametrize("build", [build_train_loader, build_eval_loader])
def test_frames_numbered_from_0_are_those_of_the_same_files_numbered_from_1(make_frame_folders, build, count_frames):
    root, _ = paths = make_frame_folders([5] * 4)
    expected = list(build(loader_config(paths, num_segments=5)))
    for folder in os.listdir(root):
        for number in range(1, 6):
            os.rename(*(os.path.join(root, folder, f"img_{n:05d}.jpg") for n in (number, number - 1)))
    config = loader_config(paths, num_segments=5, index_base=0, count_frames=count_frames)
    assert_equal_batches(expected, list(build(config)))
    config.data.index_base = 1
    line = error_of(build(config))
    assert "img_00005.jpg: frame missing" in line and "data.index_base (1)" in line


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_broken_frame_stops_the_run_with_its_path(make_frame_folders, workers, damage):
    root, list_path = paths = make_frame_folders([1] * 4)
    path = os.path.join(root, "video 2", "img_00001.jpg")
    if damage == "missing":
        os.remove(path)
    else:
        os.truncate(path, os.path.getsize(path) // 2)
    config = loader_config(paths, workers=workers)
    for build in (build_train_loader, build_eval_loader):
        line = error_of(build(config))
        assert "\n" not in line
        assert line.startswith(f"{path}: frame ")
        assert f"listed at {list_path}:3 with 1 frames" in line


def error_of(loader):
    try:
        list(loader)
    except DataError as error:
        error.__traceback__ = None  # it holds the workers in a reference cycle, which is collected only seconds later
        return error.line
    pytest.fail("no DataError")


def break_videos(root, *numbers):
    """Empty all frame files of these videos."""
    for number in numbers:
        for name in os.listdir(folder := os.path.join(root, f"video {number}")):
            open(os.path.join(folder, name), "w").close()


@pytest.mark.parametrize("workers", [0, 3])
def test_a_broken_video_is_replaced_by_the_next_one_of_the_epochs_order(make_frame_folders, workers):
    root, _ = paths = make_frame_folders([5] * 6)
    whole = build_train_loader(loader_config(paths, batch_size=1))
    batches = {epoch: epoch_batches(whole, epoch) for epoch in (0, 1)}
    order = indices(batches[0])
    broken = {order[1], order[2], order[5]}  # two in a row, and the last, which the first replaces
    break_videos(root, *broken)
    loader = build_train_loader(loader_config(paths, batch_size=1, workers=workers, on_error="skip"))
    kept = epoch_batches(loader, 0)
    assert indices(kept) == [order[i] for i in (0, 3, 3, 3, 4, 0)]
    assert_equal_batches(kept, [batches[0][i] for i in (0, 3, 3, 3, 4, 0)])
    assert {index for index, _ in loader.unreadable} == broken
    assert all(f"video {index}{os.sep}img_" in reason and "\n" not in reason for index, reason in loader.unreadable)
    order = indices(batches[1])
    for place, index in enumerate(indices(epoch_batches(loader, 1))):
        assert index == next(i for i in order[place:] + order if i not in broken)


def test_the_replacement_of_a_broken_video_does_not_depend_on_the_number_of_processes(make_frame_folders):
    root, _ = paths = make_frame_folders([5] * 6)
    break_videos(root, 1, 4)
    config = loader_config(paths, batch_size=1, on_error="skip")
    alone = indices(epoch_batches(build_train_loader(config), 2))
    ranks = [indices(epoch_batches(build_train_loader(config, rank, 2), 2)) for rank in (0, 1)]
    assert ranks == [alone[0::2], alone[1::2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_when_every_video_is_broken_training_stops(make_frame_folders, workers):
    root, _ = paths = make_frame_folders([1] * 4)
    break_videos(root, *range(4))
    line = error_of(build_train_loader(loader_config(paths, workers=workers, on_error="skip")))
    assert line.startswith(f"none of the 4 training videos can be read; the first: {root}") and "\n" not in line


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_a_broken_video_and_does_not_replace_it(make_frame_folders, workers):
    root, _ = paths = make_frame_folders([5] * 5)
    break_videos(root, 1, 2, 3)
    loader = build_eval_loader(loader_config(paths, workers=workers, on_error="skip"), clips=2)
    for _ in range(2):
        batches = list(loader)
        assert indices(batches) == [0, 4]
        assert [batch["clips"].shape for batch in batches] == [(2, 2, 3, 16, 16)] + [(0, 2, 3, 16, 16)] * 3 + [
            (2, 2, 3, 16, 16)
        ]
        assert [index for index, _ in loader.unreadable] == [1, 2, 3]


# Few shots


def test_few_shot_videos_are_the_same_on_every_process_and_change_with_the_seed(make_frame_folders):
    paths = make_frame_folders([1] * 24)  # six of each class
    config = loader_config(paths, shot=2)
    chosen = build_train_loader(config).dataset.records
    assert [record.label for record in chosen].count(3) == 2 and len(chosen) == 8
    assert chosen == sorted(chosen, key=lambda record: int(record.path.split()[1]))  # the list's order
    assert all(build_train_loader(config, rank, 2).dataset.records == chosen for rank in (0, 1))
    config.seed = 12
    assert build_train_loader(config).dataset.records != chosen
    assert len(build_eval_loader(config).dataset) == 24


def test_too_few_videos_for_the_shots_are_an_error_that_names_the_class(make_frame_folders, tmp_path):
    paths = make_frame_folders([1] * 7)  # two of each class but the last
    with pytest.raises(DataError, match="data.shot: 2 videos of every class, but class 3 has 1"):
        build_train_loader(loader_config(paths, shot=2))
    names = tmp_path / "names.csv"
    names.write_text("id,name\n0,a\n1,b\n2,c\n3,Drop\n")
    with pytest.raises(DataError, match="but Drop has 1"):
        build_train_loader(loader_config(paths, shot=2, label_list=str(names)))


# Evaluation


@pytest.mark.parametrize("world_size", [1, 2, 3, 9])
def test_evaluation_takes_every_video_once_on_any_number_of_processes(make_frame_folders, world_size):
    config = loader_config(make_frame_folders([2] * 7))
    ranks = [indices(build_eval_loader(config, rank, world_size)) for rank in range(world_size)]
    assert ranks == [list(range(rank, 7, world_size)) for rank in range(world_size)]


def test_an_evaluation_batch_contains_all_views_of_its_videos(make_frame_folders):
    config = loader_config(make_frame_folders([9] * 5), view_batch=13)
    loader = build_eval_loader(config, clips=2, crops=3)
    batches = list(loader)
    assert [len(batch["indices"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["clips"].shape == (12, 2, 3, 16, 16)
    assert batches[0]["labels"].tolist() == [0, 1]
    assert torch.equal(batches[1]["clips"], torch.cat([loader.dataset[2]["clips"], loader.dataset[3]["clips"]]))
    assert loader.dataset.records[4].path == "video 4"
    assert loader.dataset.labels.tolist() == [0, 1, 2, 3, 0]


@pytest.mark.parametrize(("view_batch", "expected"), [(1, 1), (5, 1), (12, 2), (None, 1)])
def test_videos_per_batch_follow_the_views_that_fit(make_frame_folders, view_batch, expected):
    config = loader_config(make_frame_folders([2] * 2), view_batch=view_batch)
    assert build_eval_loader(config, clips=2, crops=3).batch_size == expected


def test_workers_change_no_evaluation_batch(make_frame_folders):
    paths = make_frame_folders([9] * 5)
    plain, workers = (build_eval_loader(loader_config(paths, workers=count), clips=2, crops=3) for count in (0, 3))
    for _ in range(2):
        assert_equal_batches(list(plain), list(workers))


@pytest.mark.parametrize("build", [build_train_loader, build_eval_loader])
@pytest.mark.parametrize("prepared", [True, False], ids=["batch is prepared", "batch is not prepared"])
def test_loader_processes_that_stop_end_the_run_with_the_videos_that_they_held(make_frame_folders, build, prepared):
    """A prepared batch still needs its worker: it hands over the file descriptors of the tensors when they are read."""
    config = loader_config(make_frame_folders([8] * 8), batch_size=1, workers=2, prefetch=1)
    config.solver.timeout_minutes = 2 / 60
    loader = build(config)
    batches = iter(loader)
    next(batches)
    workers = list(loader._iterator._workers)
    if prepared:
        time.sleep(0.5)  # both have put their next batch into the queue
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerLostError) as raised, naming_lost_workers(loader):
        for _batch in batches:
            pass
    message = str(raised.value)
    raised.value.__traceback__ = None
    assert message.startswith("no loader process gave a batch for 2 s; a disk that does not answer is the usual cause;")
    assert "the loader processes held the videos " in message and "\n" not in message
    assert not any(worker.is_alive() for worker in workers)


def test_dense_evaluation_follows_the_argument_or_else_the_config(make_frame_folders):
    paths = make_frame_folders([200, 200])
    for configured, asked, dense in ((True, None, True), (True, False, False), (False, True, True)):
        loader = build_eval_loader(loader_config(paths, dense=configured), dense=asked)
        assert loader.dataset.dense is dense
