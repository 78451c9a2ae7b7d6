"""Published folders: what is in them, that they give the same scores from a folder, a cache and a hub; pushing."""

import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors import safe_open
from tiny import published_form, save_untrained, score_run, train_run

from engine.scores import load_scores, save_scores
from inference import Recognizer
from modules.checkpoint import read_checkpoint, save_released
from modules.checkpoint_places import find_checkpoint
from tools import publish
from tools.model_card import OPENAI_LIMITS
from utils.errors import CheckpointError, UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
UPDATE = ["solver.epochs=1", "solver.lr_warmup_step=0"]


@pytest.fixture
def clip_config(config, tmp_path):
    """The tiny configuration with a CLIP tower whose weights come from a file, clip_pretrain/ViT-B-16.pt."""
    content = yaml.safe_load(Path(config).read_text())
    content["network"] |= {"arch": "ViT-B/16"}
    path = tmp_path / "clip.yaml"
    path.write_text(yaml.safe_dump(content))
    model = save_untrained(path, tmp_path / "random.pt")
    weights = tmp_path / "clip_pretrain" / "ViT-B-16.pt"
    weights.parent.mkdir()
    torch.save(published_form(model.backbone), weights)
    content["network"] |= {"init": True, "weights": str(weights)}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def videos(motion_root):
    return [motion_root / "videos" / f"val_{number:05d}.mp4" for number in range(2)]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty cache of the hub; no address that leads anywhere."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub waits 23 seconds for a network to come back
    return tmp_path / "cache"


class HubHandler(BaseHTTPRequestHandler):
    """As much of the hub as downloads ask for: org/name with one file."""

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head):
        self.server.asked.append(self.path)
        if self.path.startswith("/api/"):
            return self.send_error(self.server.api_status)
        if not re.fullmatch(r"/org/name/resolve/(main|v1|[0-9a-f]{40})/model\.safetensors", self.path):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith("/org/name/") else "RepoNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = self.server.content
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not head:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(offline, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), HubHandler) as server:
        server.asked, server.content, server.api_status = [], b"", 401
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


def names_in(path):
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def test_a_published_folder_loads_everywhere_with_the_same_scores(config, checkpoint, videos, tmp_path):
    publish.main([str(checkpoint), str(tmp_path / "pub")])
    assert sorted(path.name for path in (tmp_path / "pub").iterdir()) == FILES
    expected = Recognizer.load(checkpoint)
    published = Recognizer.load(tmp_path / "pub")
    assert published.class_names == expected.class_names
    assert np.abs(published.scores(videos) - expected.scores(videos)).max() == 0.0
    scores = [
        score_run(config, source, tmp_path / f"{source.name}.npz")["scores"]
        for source in (checkpoint, tmp_path / "pub")
    ]
    assert np.array_equal(*scores)


def test_a_training_starts_from_a_folder_and_from_a_name_of_the_hub(config, checkpoint, tmp_path, hub):
    publish.main([str(checkpoint), str(tmp_path / "pub")])
    hub.content = (tmp_path / "pub" / "model.safetensors").read_bytes()
    sources = [str(checkpoint), str(tmp_path / "pub"), "org/name"]
    trained = [
        train_run(config, tmp_path / f"run{number}", f"pretrain={source}", *UPDATE)["trained"]
        for number, source in enumerate(sources)
    ]
    assert all(torch.equal(tensor, other[name]) for other in trained[1:] for name, tensor in trained[0].items())
    text = (tmp_path / "run2" / "train.log").read_text()
    assert "checkpoint: org/name is " in text and "model.safetensors (safetensors, epoch 1) loaded" in text


def test_a_name_of_the_hub_is_downloaded_once_and_then_read_from_the_cache(
    checkpoint, videos, tmp_path, hub, monkeypatch
):
    publish.main([str(checkpoint), str(tmp_path / "pub")])
    hub.content = (tmp_path / "pub" / "model.safetensors").read_bytes()
    expected = Recognizer.load(checkpoint).scores(videos)
    for name in ("org/name", "org/name@v1"):
        assert np.array_equal(Recognizer.load(name).scores(videos), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.asked.clear()
    assert np.array_equal(Recognizer.load("org/name").scores(videos), expected) and hub.asked == []
    found = find_checkpoint("org/name")
    assert found.parts[-3:] == ("snapshots", COMMIT, "model.safetensors") and "models--org--name" in found.parts


@pytest.mark.parametrize("name", ["org/other", "org/name@gone", "nobody/nothing"])
def test_a_name_that_is_nowhere_ends_with_one_line(name, hub, offline):
    with pytest.raises(CheckpointError, match=f"^{name}: no such file or folder here, and model.safetensors") as caught:
        find_checkpoint(name)
    assert "\n" not in str(caught.value) and len(caught.value.line) < 600


def test_no_network_is_one_line_and_a_path_is_never_asked_for(offline, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(CheckpointError, match="could not be fetched from the hub") as caught:
        Recognizer.load("org/name")
    assert "\n" not in str(caught.value)
    for path in ("run/model_best.pt", "a/b/c", "model", str(tmp_path / "gone")):
        assert find_checkpoint(path) == Path(path)
        with pytest.raises(CheckpointError, match="no such checkpoint"):
            Recognizer.load(path)
    assert hub.asked == []


def test_without_huggingface_hub_a_name_is_one_line_that_says_what_to_install(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="org/name: .* needs the package huggingface_hub: pip install"):
        find_checkpoint("org/name")
    with pytest.raises(UserError, match="--push: the package huggingface_hub is not installed; pip install"):
        publish.main([str(checkpoint), str(tmp_path / "pub"), "--push", "org/name"])


def test_only_what_was_trained_is_in_the_file_and_the_tower_on_request(clip_config, videos, tmp_path, monkeypatch):
    save_untrained(clip_config, tmp_path / "m.pt")
    expected = Recognizer.load(tmp_path / "m.pt").scores(videos)
    publish.main([str(tmp_path / "m.pt"), str(tmp_path / "small")])
    publish.main([str(tmp_path / "m.pt"), str(tmp_path / "whole"), "--with_tower"])
    small, whole = (tmp_path / name / "model.safetensors" for name in ("small", "whole"))
    assert all(name.startswith("trained.") for name in names_in(small))
    assert any(name.startswith("tower.") for name in names_in(whole))
    trained = sum(tensor.nbytes for tensor in read_checkpoint(tmp_path / "m.pt")["trained"].values())
    assert trained < small.stat().st_size < trained + 20_000 < whole.stat().st_size
    weights = tmp_path / "clip_pretrain" / "ViT-B-16.pt"
    assert np.array_equal(Recognizer.load(tmp_path / "small", weights=weights).scores(videos), expected)
    weights.unlink()
    assert np.array_equal(Recognizer.load(tmp_path / "whole").scores(videos), expected)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="needs the tower that it was trained beside, ViT-B-16.pt"):
        Recognizer.load(tmp_path / "small")
    with pytest.raises(CheckpointError, match="needs the tower"):
        publish.main([str(tmp_path / "m.pt"), str(tmp_path / "none"), "--with_tower"])
    assert not (tmp_path / "none").exists()


def test_the_card_says_what_the_run_knows(config, motion_root, tmp_path):
    train_run(config, tmp_path / "run")
    best = tmp_path / "run" / "model_best.pt"
    scores = score_run(config, best, tmp_path / "s.npz", "--test_crops", "3")
    publish.main(
        [str(tmp_path / "run"), str(tmp_path / "pub"), "--scores", str(tmp_path / "s.npz"), "--license", "mit"]
    )
    text = (tmp_path / "pub" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.license == "mit" and card.data.datasets == ["motion_demo"] and card.data.metrics == ["accuracy"]
    right = 100 * float((scores["scores"].argmax(1) == scores["labels"]).mean())
    tested, validated = card.data.eval_results
    assert (
        tested.metric_value == pytest.approx(right, abs=0.01) and "4 frames x 3 crops x 1 clips" in tested.metric_name
    )
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    epoch = read_checkpoint(best)["epoch"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (own,) = [row for row in rows if row["kind"] == "validation" and row["epoch"] == epoch - 1]
    assert validated.metric_value == pytest.approx(own["top1"], abs=0.01)
    known = [row["run"][name] for name in ("commit", "device", "train_list_sha256", "torch", "val_list_sha256")]
    known += [f"{epoch} finished of 2", "16 |", "SHA-256", f"{max(r.get('memory_mb', 0) for r in rows):.0f} MB"]
    known += [hashlib.sha256(best.read_bytes()).hexdigest(), "random weights, never trained", "95 % interval"]
    assert [words for words in known if words not in text] == []
    assert re.search(r"\| training time \| \d+ min \d+ s \|", text)
    assert (tmp_path / "pub" / "metrics.jsonl").read_bytes() == (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert card.data.base_model is None
    for path in (tmp_path / "pub").iterdir():
        for folder in (tmp_path, motion_root):
            assert str(folder).encode() not in path.read_bytes(), f"{path.name} names a folder of this machine"


def test_what_nobody_knows_is_called_unknown(checkpoint, tmp_path):
    publish.main([str(checkpoint), str(tmp_path / "pub")])
    text = (tmp_path / "pub" / "README.md").read_text()
    for what in ("commit", "hardware", "training time", "peak memory", "SHA-256 of the training list"):
        assert f"| {what} | unknown |" in text
    assert "Unknown: no score file was given" in text and "model-index" not in text
    assert "license: unknown" in text


def test_the_card_quotes_openai_and_names_the_base_model(clip_config, tmp_path):
    save_untrained(clip_config, tmp_path / "m.pt")
    publish.main([str(tmp_path / "m.pt"), str(tmp_path / "pub")])
    text = (tmp_path / "pub" / "README.md").read_text()
    assert OPENAI_LIMITS in text and "These are OpenAI's words" in text and "MIT License" in text
    assert "**Any** deployed use case of the model - whether commercial or not - is currently out of scope." in text
    assert ModelCard(text).data.base_model == "openai/clip-vit-base-patch16"
    settings = json.loads((tmp_path / "pub" / "config.json").read_text())
    assert settings["tower"]["file"] == "ViT-B-16.pt" and not settings["tower"]["included"]
    assert (
        settings["id2label"]["0"]
        and settings["num_labels"] == 10
        and settings["side4video"]["data"]["val_root"] is None
    )
    pixels = json.loads((tmp_path / "pub" / "preprocessor_config.json").read_text())
    assert pixels["image_mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073]) and pixels["num_frames"] == 4


def test_a_released_checkpoint_is_published_with_its_configuration(clip_config, videos, tmp_path):
    model = save_untrained(clip_config, tmp_path / "ours.pt")
    save_released(tmp_path / "released.pt", model)
    publish.main([str(tmp_path / "released.pt"), str(tmp_path / "pub"), "--config", str(clip_config)])
    assert all(name.startswith("trained.") for name in names_in(tmp_path / "pub" / "model.safetensors"))
    weights = tmp_path / "clip_pretrain" / "ViT-B-16.pt"
    published = Recognizer.load(tmp_path / "pub", weights=weights)
    released = Recognizer.load(tmp_path / "released.pt", config=clip_config)
    assert np.array_equal(published.scores(videos), released.scores(videos))


def test_scores_of_other_weights_and_changed_ones_are_refused(config, checkpoint, tmp_path):
    score_run(config, checkpoint, tmp_path / "s.npz")
    state = torch.load(checkpoint, weights_only=True)
    state["trained"]["head.bias"] += 1
    torch.save({key: value for key, value in state.items() if key != "trained_sha256"}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="s.npz: holds scores of other weights"):
        publish.main([str(tmp_path / "other.pt"), str(tmp_path / "pub"), "--scores", str(tmp_path / "s.npz")])
    result = load_scores(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as content:
        np.savez(tmp_path / "changed.npz", **{**content, "scores": result.scores[::-1]})
    with pytest.raises(UserError, match="changed.npz: has changed since"):
        publish.main([str(checkpoint), str(tmp_path / "pub"), "--scores", str(tmp_path / "changed.npz")])
    result.labels[:] = -1
    save_scores(tmp_path / "none.npz", result)
    with pytest.raises(UserError, match="none.npz: has no labels"):
        publish.main([str(checkpoint), str(tmp_path / "pub"), "--scores", str(tmp_path / "none.npz")])
    assert not (tmp_path / "pub").exists()


def test_a_folder_appears_whole_or_not_at_all(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(UserError, match="full: holds files already and is not overwritten; name another folder"):
        publish.main([str(checkpoint), str(tmp_path / "full")])
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())

    def no_room(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(publish, "write_json", no_room)
        with pytest.raises(UserError, match="empty: cannot be written: No space left on device"):
            publish.main([str(checkpoint), str(tmp_path / "empty")])
    assert sorted(tmp_path.iterdir()) == before and not any((tmp_path / "empty").iterdir())
    publish.main([str(checkpoint), str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "README.md").is_file()


class StubApi:
    """HfApi at its narrowest: what publish calls, and with what."""

    calls: list = []

    def __init__(self, endpoint=None):
        self.endpoint = "https://hub"

    def whoami(self):
        self.calls.append("whoami")

    def create_repo(self, name, exist_ok):
        self.calls.append(("create", name, exist_ok))

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))


@pytest.fixture
def stub(monkeypatch, offline):
    StubApi.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", StubApi)
    return StubApi.calls


def test_nothing_is_pushed_without_being_asked(checkpoint, tmp_path, stub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    publish.main([str(checkpoint), str(tmp_path / "a")])
    assert stub == []
    publish.main([str(checkpoint), str(tmp_path / "b"), "--push", "org/name"])
    assert stub == ["whoami", ("create", "org/name", True), ("upload", "org/name", FILES)]
    assert "pushed: https://hub/org/name\n" in capsys.readouterr().out
    assert 'Recognizer.load("org/name")' in (tmp_path / "b" / "README.md").read_text()


def test_a_push_that_cannot_be_is_one_line_before_any_work(checkpoint, tmp_path, hub, offline, monkeypatch):
    def push(name="org/name"):
        with pytest.raises(UserError) as caught:
            publish.main([str(checkpoint), str(tmp_path / "pub"), "--push", name])
        assert "\n" not in str(caught.value) and not (tmp_path / "pub").exists()
        return caught.value.line

    assert push("name") == "--push name: must have the form ORG/NAME"
    assert push() == "--push: no token of the hub is set; run hf auth login, or set HF_TOKEN"
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert push().startswith("--push org/name: the hub does not answer or knows no such token (")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert push().startswith("--push org/name: the hub does not answer or knows no such token (")


def test_an_upload_that_fails_keeps_the_folder_and_says_how_to_go_on(checkpoint, tmp_path, stub, monkeypatch):
    def refused(self, **_):
        raise RuntimeError("413\nToo large")

    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(StubApi, "upload_folder", refused)
    with pytest.raises(
        UserError, match=r"RuntimeError: 413 Too large; .*pub is complete: hf upload org/name .*pub tries"
    ):
        publish.main([str(checkpoint), str(tmp_path / "pub"), "--push", "org/name"])
    assert (tmp_path / "pub" / "model.safetensors").is_file()


def test_a_changed_byte_in_the_published_file_is_refused(checkpoint, tmp_path):
    publish.main([str(checkpoint), str(tmp_path / "pub")])
    path = tmp_path / "pub" / "model.safetensors"
    content = path.read_bytes()
    for place in (content.index(b"best_accuracy") + 2, len(content) - 5, len(content) // 2):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError):
            Recognizer.load(tmp_path / "pub")
