"""The certificate of a result: every change of list, scores, checkpoint and the rest is found; bounds are exact."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import published_form, save_untrained, score_run

import test as test_program
from engine.certificate import OFFICIAL_VIDEOS, bounds
from engine.scores import PartialScores, load_scores, save_scores, seal_of
from engine.statistics import finite_interval
from modules.checkpoint import save_released
from tools import certify, compare_scores
from tools.motion_demo import CLASSES
from utils.errors import ConfigError, DataError, UserError


def write_config(folder: Path, motion_root: Path, arch: str = "timm/vit_tiny_patch16_224") -> str:
    """A configuration with its own copies of list and class names, so that a test can change them."""
    for name in ("val.txt", "classes.csv"):
        shutil.copy(motion_root / name, folder / name)
    data = {
        "dataset": "motion_demo",
        "num_segments": 2,
        "batch_size": 4,
        "workers": 0,
        "num_classes": len(CLASSES),
        "label_list": str(folder / "classes.csv"),
        "input_size": 32,
        "val_root": str(motion_root / "frames"),
        "val_list": str(folder / "val.txt"),
    }
    network = {"arch": arch, "init": False, "side_dim": 64}
    network["backbone_kwargs"] = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    (folder / "tiny.yaml").write_text(
        yaml.safe_dump({"data": data, "network": network, "solver": {"epochs": 1, "lr": 1e-3}})
    )
    return str(folder / "tiny.yaml")


@pytest.fixture(scope="module")
def tested(tmp_path_factory, motion_root):
    """A folder with tiny.yaml, val.txt, classes.csv, m.pt and s.npz, the scores of m.pt."""
    folder = tmp_path_factory.mktemp("tested")
    config = write_config(folder, motion_root)
    save_untrained(config, folder / "m.pt")
    score_run(config, folder / "m.pt", folder / "s.npz", "--test_crops", "3")
    return folder


@pytest.fixture
def copied(tested, tmp_path):
    """A copy of the folder; the score file names the checkpoint of the first one, so it is given to `say`."""
    for file in tested.iterdir():
        if file.is_file():
            shutil.copy(file, tmp_path)
    return tmp_path


@pytest.fixture
def say(capsys):
    """say(folder, *arguments): the output of certify on its s.npz, with its m.pt; None for a failed check."""

    def run(folder, *arguments, checkpoint="m.pt"):
        options = ["--checkpoint", str(folder / checkpoint)] if checkpoint else []
        own = [f"data.val_list={folder / 'val.txt'}", f"data.label_list={folder / 'classes.csv'}"]
        try:
            certify.main([str(folder / "s.npz"), str(folder / "tiny.yaml"), *options, *arguments, *own])
        except DataError as error:
            return states(capsys.readouterr().out), error.line
        return states(out := capsys.readouterr().out), out

    return run


def states(output):
    """{check: state} of the lines of an output."""
    return {
        line[:12].strip(): line[13:25].strip()
        for line in output.splitlines()
        if line[13:25].strip() in (certify.OK, certify.FAILED, certify.NOT_CHECKED)
    }


CHECKS = ["score file", "list", "checkpoint", "weights", "tower", "class names", "protocol", "counts"]


def failed(found):
    return [what for what, state in found.items() if state == certify.FAILED]


def test_an_untouched_result_is_certified_and_the_line_says_what_counts(tested, say):
    found, out = say(tested, checkpoint=None)
    assert found == dict.fromkeys(CHECKS, certify.OK)
    scores = load_scores(tested / "s.npz")
    right = int((scores.scores.argmax(1) == scores.labels).sum())
    line = out.splitlines()[-1]
    assert line.startswith(f"Top-1 {100 * right / 7:.2f} % (95 % interval ")
    assert "on 7 videos of motion_demo, 2 frames x 3 crops x 1 clips, precision fp32. No video is missing." in line
    for digest in (scores.protocol["list_sha256"], scores.certificate["checkpoint_sha256"]):
        assert digest[:12] in line
    assert "torch " in line and "commit " in line and "Not checked" not in line


def test_the_certificate_holds_what_the_issue_names(tested):
    with np.load(tested / "s.npz") as content:
        assert {"paths", "labels", "scores", "damaged", "protocol", "class_names", "num_frames", "thumbnails"} <= set(
            content.files
        )
        certificate = json.loads(str(content["certificate"]))
    assert {name: certificate[name] for name in ("expected", "scored", "damaged", "unreadable")} == {
        "expected": 7, "scored": 7, "damaged": 0, "unreadable": 0
    }  # fmt: skip
    for name in ("checkpoint_sha256", "tower_sha256", "class_names_sha256"):
        assert len(certificate[name]) == 64
    (environment,) = certificate["environments"]
    assert environment["torch"] == torch.__version__ and {"timm", "NumPy", "Python", "commit", "device"} <= set(
        environment
    )


def test_a_changed_byte_anywhere_in_the_score_file_is_found(copied):
    content = (copied / "s.npz").read_bytes()
    places = {*range(0, len(content), max(1, len(content) // 150)), *range(len(content) - 120, len(content))}
    seen = set()
    for place in sorted(places):
        changed = bytearray(content)
        changed[place] ^= 1
        (copied / "s.npz").write_bytes(changed)
        try:
            result = load_scores(copied / "s.npz")
        except DataError:
            seen.add("unreadable")
            continue
        assert certify.check_seal(copied / "s.npz", result).state == certify.FAILED, place
        seen.add("seal")
    assert seen == {"unreadable", "seal"}


def test_scores_labels_and_paths_that_were_edited_and_saved_again_are_found(copied, say):
    for name, edit in {
        "scores": lambda values: values[::-1],
        "labels": lambda values: (values + 1) % 10,
        "paths": lambda values: np.array([f"{path}x" for path in values]),
    }.items():
        with np.load(copied / "s.npz") as content:
            arrays = {key: content[key] for key in content.files}
        arrays[name] = edit(arrays[name])
        shutil.copy(copied / "s.npz", copied / "kept.npz")
        np.savez(copied / "s.npz", **arrays)
        found, line = say(copied)
        assert "score file" in failed(found) and "not as certified" in line
        # Sealed again by somebody who knows how: list and counts still disagree with paths and labels.
        save_scores(copied / "s.npz", load_scores(copied / "s.npz"))
        assert failed(say(copied)[0]) == ([] if name == "scores" else ["list"])
        shutil.move(copied / "kept.npz", copied / "s.npz")


def test_a_changed_byte_in_list_checkpoint_or_class_names_is_found(copied, say):
    text = (copied / "val.txt").read_text()
    (copied / "val.txt").write_text(text.replace("val_00000 6 0", "val_00000 6 1"))
    found, line = say(copied)
    assert failed(found) == ["list"] and "list: not as certified" in line
    (copied / "val.txt").write_text(text + "\n")  # no other video, but another file
    assert failed(say(copied)[0]) == ["list"]
    (copied / "val.txt").write_text(text)

    content = (copied / "m.pt").read_bytes()
    for place in (len(content) // 2, len(content) - 30, 1000):
        changed = bytearray(content)
        changed[place] ^= 1
        (copied / "m.pt").write_bytes(changed)
        assert failed(say(copied)[0])[0] == "checkpoint", place
    (copied / "m.pt").write_bytes(content)

    names = (copied / "classes.csv").read_text()
    (copied / "classes.csv").write_text(names.replace("moving", "going"))
    assert failed(say(copied)[0]) == ["class names"]


def test_another_protocol_or_another_model_is_found(copied, say, tmp_path):
    found, _ = say(copied, "data.num_segments=3")
    assert failed(found) == ["protocol"]
    found, _ = say(copied, "data.modality=video")
    assert "protocol" in failed(found) and "list" in failed(found)
    torch.manual_seed(5)
    state = torch.load(copied / "m.pt", weights_only=True)
    from modules.checkpoint import save_checkpoint

    state["trained"]["head.bias"] += 1
    save_checkpoint(copied / "other.pt", {key: value for key, value in state.items() if not key.endswith("d_sha256")})
    found, _ = say(copied, checkpoint="other.pt")
    assert failed(found) == ["checkpoint", "weights"]


def test_counts_and_certificate_that_disagree_are_found(copied, say):
    result = load_scores(copied / "s.npz")
    save_scores(copied / "s.npz", replace(result, certificate={**result.certificate, "unreadable": 1, "scored": 6}))
    assert failed(say(copied)[0]) == ["counts"]


def test_what_is_not_there_is_not_checked_and_the_line_says_so(copied, say):
    result = load_scores(copied / "s.npz")
    save_scores(copied / "s.npz", replace(result, protocol={**result.protocol, "checkpoint": "gone.pt"}))
    (copied / "val.txt").unlink()
    found, out = say(copied, checkpoint=None)
    assert [what for what, state in found.items() if state == certify.NOT_CHECKED] == [
        "list", "checkpoint", "weights", "tower"
    ]  # fmt: skip
    assert out.splitlines()[-1].endswith(" Not checked: list, checkpoint, weights, tower.")
    found, line = say(copied, checkpoint="gone.pt")
    assert failed(found) == ["checkpoint"]


def test_an_older_score_file_is_read_and_one_line_says_what_cannot_be_checked(copied, say, capsys):
    with np.load(copied / "s.npz") as content:
        arrays = {key: content[key] for key in content.files if key != "certificate"}
    np.savez(copied / "s.npz", **arrays)
    found, out = say(copied)
    assert [line for line in out.splitlines() if "holds no certificate" in line] != []
    assert failed(found) == [] and found["list"] == found["weights"] == found["protocol"] == certify.OK
    assert all(found[what] == certify.NOT_CHECKED for what in ("score file", "checkpoint", "tower", "counts"))


def test_old_and_new_files_are_compared_and_a_mixture_has_no_certificate(tested, copied, capsys):
    with np.load(copied / "s.npz") as content:
        np.savez(copied / "old.npz", **{key: content[key] for key in content.files if key != "certificate"})
    compare_scores.main([str(tested / "s.npz"), str(copied / "old.npz"), "--fused", str(copied / "fused.npz")])
    assert "verdict: equal up to rounding" in capsys.readouterr().out
    assert load_scores(copied / "fused.npz").certificate is None and seal_of(copied / "fused.npz")


def test_an_interrupted_test_has_the_certificate_of_both_parts(tested, tmp_path, monkeypatch, say):
    class Killed(BaseException):
        pass

    def software(version):
        real = original(torch.device("cpu"))
        monkeypatch.setattr(test_program, "describe_software", lambda device: {**real, "torch": version})
        return {**real, "torch": version}

    def interrupted(self, indices, *rows):
        add(self, indices, *rows)
        raise Killed

    original, add = test_program.describe_software, PartialScores.add
    for name in ("tiny.yaml", "val.txt", "classes.csv", "m.pt"):
        shutil.copy(tested / name, tmp_path)
    arguments = (str(tmp_path / "tiny.yaml"), tmp_path / "m.pt", tmp_path / "s.npz", "--test_crops", "3")
    first = software("1")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartialScores, "add", interrupted)
        score_run(*arguments)
    second = software("2")
    score_run(*arguments)
    certificate = load_scores(tmp_path / "s.npz").certificate
    assert certificate["environments"] == [first, second]
    whole = load_scores(tested / "s.npz").certificate
    assert {**certificate, "environments": 0} == {**whole, "environments": 0}
    found, out = say(tmp_path)
    assert failed(found) == [] and all(f"torch {version}, timm" in out.splitlines()[-1] for version in "12")


def test_a_released_checkpoint_is_certified_by_its_own_tower(motion_root, tmp_path, say):
    config = write_config(tmp_path, motion_root, "ViT-B/16")
    model = save_untrained(config, tmp_path / "ours.pt")
    save_released(tmp_path / "m.pt", model)
    score_run(config, tmp_path / "m.pt", tmp_path / "s.npz")
    assert failed(say(tmp_path)[0]) == []
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    state["model_state_dict"]["visual.conv1.weight"] += 1
    torch.save(state, tmp_path / "other.pt")
    assert failed(say(tmp_path, checkpoint="other.pt")[0]) == ["checkpoint", "tower"]


def test_the_towers_file_is_checked_where_it_is_and_else_its_hash(motion_root, tmp_path, say, monkeypatch):
    config = write_config(tmp_path, motion_root, "ViT-B/16")
    weights = tmp_path / "clip.pt"
    torch.save(published_form(save_untrained(config, tmp_path / "random.pt").backbone), weights)
    (tmp_path / "random.pt").unlink()
    content = yaml.safe_load(Path(config).read_text())
    content["network"] |= {"init": True, "weights": str(weights)}
    Path(config).write_text(yaml.safe_dump(content))
    save_untrained(config, tmp_path / "m.pt")
    score_run(config, tmp_path / "m.pt", tmp_path / "s.npz")
    assert say(tmp_path)[0] == dict.fromkeys(CHECKS, certify.OK)
    weights.rename(tmp_path / "elsewhere.pt")
    monkeypatch.chdir(tmp_path)
    found, out = say(tmp_path)
    assert found == {**dict.fromkeys(CHECKS, certify.OK), "tower": certify.NOT_CHECKED}
    assert out.splitlines()[-1].endswith(" Not checked: tower.")
    assert say(tmp_path, "--weights", str(tmp_path / "elsewhere.pt"))[0]["tower"] == certify.OK
    state = torch.load(tmp_path / "elsewhere.pt", weights_only=True)
    state["visual.conv1.weight"][0, 0, 0, 0] += 1
    torch.save(state, tmp_path / "changed.pt")
    assert failed(say(tmp_path, "--weights", str(tmp_path / "changed.pt"))[0]) == ["weights"]


def test_the_report_shows_the_certificate(tested, tmp_path):
    test_program.main(
        ["--config", str(tested / "tiny.yaml"), "--weights", str(tested / "m.pt"), "--report", str(tmp_path / "r")]
    )
    page = (tmp_path / "r" / "report.html").read_text()
    certificate = load_scores(tested / "s.npz").certificate
    for name in ("checkpoint_sha256", "tower_sha256", "class_names_sha256"):
        assert certificate[name] in page
    assert "videos expected" in page and "SHA-256 of the list" in page and f"torch {torch.__version__}, timm" in page


def test_missing_videos_are_counted_from_the_published_list_the_option_or_the_list(tested, copied, say):
    result = load_scores(tested / "s.npz")
    scores = result.scores.copy()
    scores[2] = np.nan
    certificate = {**result.certificate, "scored": 6, "unreadable": 1}
    save_scores(copied / "s.npz", replace(result, scores=scores, certificate=certificate))
    right = int((np.argmax(scores[~np.isnan(scores[:, 0])], 1) == np.delete(result.labels, 2)).sum())
    _, out = say(copied, "--expected", "9")
    assert "9 videos (as --expected says), 3 missing" in out
    assert f"lies between {100 * right / 9:.2f} % (each missing one wrong) and {100 * (right + 3) / 9:.2f} %" in out
    assert "3 of 9 videos are missing" in out.splitlines()[-1]
    _, out = say(copied)
    assert "7 videos (those of the list; --expected N gives another number), 1 missing" in out
    config = certify.read_config(copied / "tiny.yaml", ["data.dataset=kinetics400"], purpose="model")
    assert certify.expected_videos(result, config, None)[0] == OFFICIAL_VIDEOS["kinetics400"]
    with pytest.raises(ConfigError, match="--expected: 6 is fewer than the 7 videos"):
        say(copied, "--expected", "6")


def test_worst_and_best_are_those_of_every_completion():
    for scored, right, total in ((4, 3, 7), (5, 0, 6), (6, 6, 6), (0, 0, 3)):
        shares = {(right + sum(rest)) / total for rest in itertools.product((0, 1), repeat=total - scored)}
        found = bounds(right, scored, total)
        assert (found.worst, found.best) == (min(shares), max(shares))


def test_the_interval_of_a_finite_set_inverts_the_hypergeometric_tests():
    for total in (1, 2, 9, 23):
        for n in range(total + 1):
            for right in range(n + 1):
                fits = []
                for whole in range(right, total - (n - right) + 1):
                    p = [
                        math.comb(whole, k) * math.comb(total - whole, n - k) / math.comb(total, n)
                        for k in range(n + 1)
                    ]
                    if sum(p[right:]) > 0.025 and sum(p[: right + 1]) > 0.025:
                        fits.append(whole / total)
                assert finite_interval(right, n, total) == (min(fits), max(fits)), (right, n, total)


def test_the_interval_of_a_finite_set_holds_in_95_of_100_draws():
    rng = np.random.default_rng(0)
    truth = np.zeros(400, bool)
    truth[:290] = True
    hits = 0
    for _ in range(400):
        low, high = finite_interval(int(rng.choice(truth, 360, replace=False).sum()), 360, 400)
        hits += low <= truth.mean() <= high
    assert hits >= 0.95 * 400 - 10


def test_bad_score_files_are_one_line(tested, tmp_path):
    (tmp_path / "text.npz").write_text("no scores")
    for name in ("text.npz", "gone.npz"):
        with pytest.raises(UserError, match=name) as caught:
            certify.main([str(tmp_path / name), str(tested / "tiny.yaml")])
        assert "\n" not in caught.value.line
