"""Several side networks beside one tower: each is, to the bit, the training that it would be alone."""

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import run_script, score_run, tiny_config, train_run

import train as train_program
from engine.configuration import default_config, read_config
from engine.loops import train_one_epoch
from engine.starts import Start, build_models
from modules import build_model
from modules.backbones import FrozenTower
from modules.build import build_trained
from modules.side4video import SharedTower, share_tower, token_streams
from utils.config_schema import FIELDS, OWN_KEYS
from utils.errors import CheckpointError, ConfigError, UserError

RUNS = {
    "plain": {},
    "slow": {"solver.lr": 3e-4, "solver.smoothing": 0.0, "solver.clip_grad": 0.5, "init_seed": 5},
    "other": {"network.side_dim": 128, "network.side_variant": "post", "network.side_layers": [0], "solver.ema": 0.9},
    "probe": {"network.side": "attentive", "network.drop_fc": 0.0, "solver.recompute": False},
}
MIXED = {"plain": {}, "wide": {"network.side_dim": 128, "solver.lr": 3e-4}}
AUGMENTED = ["data.rand_aug=True", "data.rand_erase=True", "solver.mixup=True", "data.num_sample=2"]
ACCUMULATED = ["solver.grad_accumulation_steps=2", "data.batch_size=2"]


def as_argument(runs):
    return f"runs={json.dumps(runs)}"


def alone(values):
    """Arguments of the command line for the values of one run."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (a != a and b != b)


def assert_same_run(folder, other):
    """Checkpoints, and the numbers of the metrics but times and memory, are the same."""
    for name in ("last_model.pt", "last_model_1.pt", "model_best.pt", "model_best_ema.pt"):
        there = [(Path(path) / name).is_file() for path in (folder, other)]
        assert there[0] == there[1], name
        if there[0]:
            one, two = (torch.load(Path(path) / name, weights_only=True) for path in (folder, other))
            assert one.keys() == two.keys()
            for key in one:
                assert key == "config" or equal(one[key], two[key]), f"{name}: {key}"
            for state in (one, two):  # these say how a run came here, not what it is
                state["config"]["resume"] = state["config"]["logging"]["save_minutes"] = None
            assert one["config"] == two["config"]
    numbers = []
    for path in (folder, other):
        rows = [json.loads(line) for line in (Path(path) / "metrics.jsonl").read_text().splitlines()]
        changing = ("time", "clips_per_second", "waiting", "memory_mb", "run")  # `run`: when and where it started
        numbers.append([{key: value for key, value in row.items() if key not in changing} for row in rows])
    assert numbers[0] == numbers[1]


@pytest.mark.parametrize(("runs", "shared"), [(RUNS, ACCUMULATED), (MIXED, AUGMENTED)], ids=["own values", "augmented"])
def test_each_run_is_the_same_to_the_bit_as_alone(config, tmp_path, runs, shared):
    """Dropout, accumulation, mixing, erasing, averages, other layers and widths, probes."""
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), *shared, as_argument(runs)])
    for name, values in runs.items():
        train_run(config, tmp_path / name, *shared, *alone(values))
        assert_same_run(tmp_path / "all" / name, tmp_path / name)
    states = [torch.load(tmp_path / name / "last_model.pt", weights_only=True)["trained"] for name in runs]
    assert not any(equal(a, b) for a, b in itertools.combinations(states, 2))


class Killed(Exception):
    """Stands for the end of a process at any moment."""


def train_until_killed(monkeypatch, config, output, steps, *arguments):
    """Train, save after every update, and end after so many of them; returns nothing."""
    done = itertools.count(1)

    def killing(runs, loader, epoch, after_update):
        def update(step):
            after_update(step)
            if next(done) == steps:
                raise Killed

        train_one_epoch(runs, loader, epoch, update)

    monkeypatch.setattr(train_program, "train_one_epoch", killing)
    with pytest.raises(Killed):
        train_program.main(["--config", config, "--output", str(output), "logging.save_minutes=0.000001", *arguments])
    monkeypatch.setattr(train_program, "train_one_epoch", train_one_epoch)


def test_the_whole_and_one_of_them_resume_like_unbroken_runs(config, tmp_path, monkeypatch):
    """Killed in the second epoch; one run goes on alone to the end; then all go on, and wait where they are ahead."""
    argument = as_argument(RUNS)
    train_program.main(["--config", config, "--output", str(tmp_path / "whole"), argument])
    broken = tmp_path / "broken"
    train_until_killed(monkeypatch, config, broken, 6, argument)
    assert torch.load(broken / "slow" / "last_model.pt", weights_only=True)["step"] == 2
    # One of them alone, once by its own configuration, and not to the end, so that the runs stand at different places.
    own = str(broken / "slow" / "config.yaml")
    train_program.main(["--config", own, "--output", str(broken / "slow"), "resume=auto"])
    train_until_killed(monkeypatch, config, broken / "other", 1, "resume=auto", *alone(RUNS["other"]))
    places = [torch.load(broken / name / "last_model.pt", weights_only=True) for name in RUNS]
    assert [(state["epoch"], state["step"]) for state in places] == [(1, 2), (2, 0), (1, 3), (1, 2)]
    train_program.main(["--config", config, "--output", str(broken), "resume=auto", argument])
    for name in RUNS:
        assert_same_run(broken / name, tmp_path / "whole" / name)
    # Nothing is left to do, and nothing changes.
    before = {path: path.read_bytes() for path in broken.glob("*/*.pt")}
    train_program.main(["--config", config, "--output", str(broken), "resume=auto", argument])
    assert before == {path: path.read_bytes() for path in broken.glob("*/*.pt")}


def test_a_run_that_is_added_later_catches_up(config, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), as_argument(MIXED)])
    more = {**MIXED, "late": {"solver.lr": 5e-4}}
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), "resume=auto", as_argument(more)])
    train_run(config, tmp_path / "late", *alone(more["late"]))
    assert_same_run(tmp_path / "all" / "late", tmp_path / "late")


def test_a_run_that_patience_ends_leaves_the_others_as_they_are(config, tmp_path):
    runs = {"short": {"solver.patience": 1, "solver.lr": 1e-9}, "long": {}}
    shared = ["solver.epochs=4"]
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), *shared, as_argument(runs)])
    for name, values in runs.items():
        train_run(config, tmp_path / name, *shared, *alone(values))
        assert_same_run(tmp_path / "all" / name, tmp_path / name)
    last = {name: torch.load(tmp_path / name / "last_model.pt", weights_only=True)["epoch"] for name in runs}
    assert last["short"] < last["long"] == 4
    assert "[short] finished: no better validation" in (tmp_path / "all" / "train.log").read_text()


def test_two_processes_train_the_same_runs_as_alone(config, tmp_path):
    runs = {"plain": {"solver.sync_bn": True}, "wide": {"network.side_dim": 128}}
    shared = ["data.batch_size=2", "solver.epochs=1"]
    ran = run_script(
        "run_train_vision.sh", config, "--output", tmp_path / "all", *shared, as_argument(runs), NUM_GPUS="2"
    )
    assert ran.returncode == 0, ran.stderr
    for name, values in runs.items():
        arguments = ["--output", tmp_path / name, *shared, *alone(values)]
        ran = run_script("run_train_vision.sh", config, *arguments, NUM_GPUS="2")
        assert ran.returncode == 0, ran.stderr
        assert_same_run(tmp_path / "all" / name, tmp_path / name)


def test_the_tower_runs_once_for_all_and_validation_is_one_pass(config, tmp_path, monkeypatch):
    passes, real = [], FrozenTower.embed
    monkeypatch.setattr(FrozenTower, "embed", lambda self, clips: (passes.append(len(clips)), real(self, clips))[1])
    arguments = ["--config", config, "solver.epochs=1"]
    train_program.main([*arguments, "--output", str(tmp_path / "one")])
    one = list(passes)
    passes.clear()
    train_program.main([*arguments, "--output", str(tmp_path / "all"), as_argument({"a": {}, "b": {}, "c": {}})])
    assert passes == one


def test_the_folder_holds_ordinary_runs_a_log_and_a_table(config, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), as_argument(RUNS)])
    folder = tmp_path / "all"
    assert {path.name for path in folder.iterdir()} == {*RUNS, "config.yaml", "train.log", "runs.csv"}
    ordinary = {"last_model.pt", "last_model_1.pt", "model_best.pt", "config.yaml", "train.log", "metrics.jsonl"}
    for name in RUNS:
        assert ordinary <= {path.name for path in (folder / name).iterdir()}
    log = (folder / "slow" / "train.log").read_text()
    assert "[slow]" not in log and "solver.lr 0.0003" in log and log.count("epoch 1 done") == 1
    assert (folder / "train.log").read_text().count("epoch 1 done") == len(RUNS)
    with open(folder / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == list(RUNS)
    best = {name: torch.load(folder / name / "model_best.pt", weights_only=True)["best_accuracy"] for name in RUNS}
    assert [float(row["top1"]) for row in rows] == [round(top1, 4) for top1 in best.values()]
    assert [row["network.side_dim"] for row in rows] == ["64", "64", "128", "64"]
    printed = [line.split()[2:] for line in (folder / "train.log").read_text().splitlines()[-1 - len(RUNS) :]]
    assert [line[0] for line in printed] == ["run", *RUNS]
    # The folder's configuration is the training's.
    again = read_config(folder / "config.yaml")
    assert again.toDict() == read_config(config, [as_argument(RUNS)]).toDict()


def test_a_run_is_tested_by_its_checkpoint(config, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), as_argument(RUNS)])
    for name in RUNS:
        path = tmp_path / "all" / name
        file = tmp_path / f"{name}.npz"
        score_run(str(path / "config.yaml"), path / "model_best.pt", file)
        train_rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        best = max(row["top1"] for row in train_rows if row["kind"] == "validation")
        scores = np.load(file)
        assert 100 * (scores["scores"].argmax(1) == scores["labels"]).mean() == pytest.approx(best)


@pytest.mark.parametrize("key", sorted(FIELDS.keys() - {*OWN_KEYS, "base"}))
def test_a_key_that_cannot_differ_is_refused_by_name_and_with_the_reason(config, tmp_path, key):
    with pytest.raises(ConfigError, match=rf"command line: runs: a: {key}: cannot differ between runs: \w+"):
        read_config(config, [as_argument({"a": {key: 1}})])


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("{a: {solver.lrr: 1}}", "runs: a: solver.lrr: unknown key; did you mean solver.lr?"),
        ("{a: {solver: {lr: 1}}}", "runs: a: solver: a section; write its keys in full"),
        ("{a: {solver.lr: high}}", "runs: a: solver.lr: is 'high', must be a number"),
        ("{a/b: {}}", "runs: 'a/b' names a folder"),
        ("{..: {}}", "runs: '..' names a folder"),
        ("{a: 3}", "runs: a: is 3, must be a mapping"),
        ("[1]", r"runs: is \[1\], must be a mapping"),
    ],
)
def test_a_mistake_in_runs_is_one_line(config, given, problem):
    with pytest.raises(ConfigError, match=f"command line: {problem}"):
        read_config(config, [f"runs={given}"])


def test_runs_of_a_file_name_its_line(config):
    text = Path(config).read_text() + "runs:\n  a:\n    solver.lrr: 1\n"
    Path(config).write_text(text)
    line = text.splitlines().index("runs:") + 1
    with pytest.raises(ConfigError, match=rf"tiny.yaml:{line}: runs: a: solver.lrr: unknown key"):
        read_config(config)


def test_folders_of_one_and_of_several_runs_are_not_mixed(config, tmp_path):
    train_run(config, tmp_path / "one", "solver.epochs=1")
    with pytest.raises(UserError, match="holds last_model.pt of a run alone; with runs"):
        train_run(config, tmp_path / "one", "resume=auto", as_argument(MIXED))
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), "solver.epochs=1", as_argument(MIXED)])
    with pytest.raises(UserError, match="holds several runs"):
        train_run(config, tmp_path / "all", "resume=auto")
    with pytest.raises(UserError, match="plain: holds last_model.pt of another run"):
        train_program.main(["--config", config, "--output", str(tmp_path / "all"), as_argument(MIXED)])
    with pytest.raises(ConfigError, match="resume: with runs, only auto"):
        last = tmp_path / "one" / "last_model.pt"
        train_program.main(
            ["--config", config, "--output", str(tmp_path / "new"), f"resume={last}", as_argument(MIXED)]
        )
    assert not (tmp_path / "new").exists()


def test_runs_beside_different_towers_are_refused(config, tmp_path):
    for name, seed in (("plain", 1), ("wide", 2)):
        train_run(config, tmp_path / "all" / name, "solver.epochs=1", *alone(MIXED[name]), f"seed={seed}")
    with pytest.raises(CheckpointError, match="plain, wide were trained beside different towers"):
        arguments = ["--allow_config_change", "resume=auto", as_argument(MIXED)]
        train_program.main(["--config", config, "--output", str(tmp_path / "all"), *arguments])


def test_the_seed_of_the_first_weights_changes_nothing_else(config):
    """Each start is drawn behind the tower as torch draws it; the towers are the same."""
    read = read_config(config, [as_argument({"a": {}, "b": {"init_seed": 5}, "c": {"init_seed": 5}, "d": {}})])
    starts = [Start(name, own, None, None, False, None) for name, own in read.runs.items()]
    models, _ = build_models(starts, None)
    a, b, c, d = (model.trained.state_dict() for model in models)
    assert equal(a, d) and equal(b, c) and not equal(a, b)
    torch.manual_seed(5)
    assert equal(b, build_trained(read, models[0].backbone).state_dict())


def test_all_runs_are_evaluated_without_training(config, tmp_path):
    arguments = ["--config", config, "--output", str(tmp_path / "all"), as_argument(MIXED), "solver.epochs=1"]
    best = train_program.train(read_config(config, arguments[4:]), str(tmp_path / "all"))
    before = {path: path.read_bytes() for path in tmp_path.glob("all/*/*.pt")}
    found = train_program.train(
        read_config(config, [*arguments[4:], "resume=auto", "solver.evaluate=True"]), arguments[3]
    )
    assert found == best and before == {path: path.read_bytes() for path in tmp_path.glob("all/*/*.pt")}


# The tower's tokens


def test_tokens_are_kept_until_the_last_reader_has_them_and_no_longer():
    class Tower:
        layers = [0, 2, 3]

        def layer_tokens(self, clips):
            for layer in self.layers:
                made.append(layer)
                yield torch.full((1,), layer)

    made = []
    first, second = token_streams(Tower(), None, [[0, 2, 3], [2]])
    assert made == []
    assert [int(next(first)) for _ in range(2)] == [0, 2] and made == [0, 2]
    assert [int(tokens) for tokens in second] == [2] and made == [0, 2]
    assert [int(tokens) for tokens in first] == [3] and made == [0, 2, 3]


def test_a_shared_tower_gives_each_models_logits():
    models = []
    for number, layers in enumerate(("all", "every2", [0])):
        torch.manual_seed(0)
        config = tiny_config()
        config.network.side_layers = layers
        model = build_model(config).eval()
        torch.nn.init.normal_(model.trained.head.weight, std=number + 1.0)
        models.append(model)
    clips = torch.randn(3, 2, 3, 32, 32)
    with torch.no_grad():
        wanted = torch.stack([model(clips) for model in models], dim=1)
        share_tower(models)
        assert len({id(model.backbone) for model in models}) == 1
        assert torch.equal(SharedTower(models)(clips), wanted)
        assert torch.equal(models[2](clips), wanted[:, 2])  # a model alone leaves out what it does not read


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("probe", ["linear", "attentive"])
def test_a_probe_knows_the_order_of_frames_only_if_it_does_not_average(probe, average):
    torch.manual_seed(0)
    config = default_config(network={"side": probe, "average_frames": average})
    model = build_model(config).eval()
    assert model.layers == [model.backbone.depth - 1]
    clips = torch.randn(2, config.data.num_segments, 3, 32, 32)
    with torch.no_grad():
        forward, backward = model(clips), model(clips.flip(1))
    assert torch.allclose(forward, backward, atol=1e-5) == average
    assert not torch.allclose(forward[0], forward[1], atol=1e-3)


def test_a_written_configuration_of_runs_is_short(config, tmp_path):
    train_program.main(["--config", config, "--output", str(tmp_path / "all"), "solver.epochs=1", as_argument(MIXED)])
    plain = yaml.safe_load((tmp_path / "all" / "config.yaml").read_text())
    assert plain["runs"] == {"plain": {}, "wide": {"network.side_dim": 128, "solver.lr": 3e-4}}
