"""tools/download_weights.py against a local server: complete, interrupted, wrong and refused downloads."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from modules.backbones import ARCHITECTURES
from tools import download_weights
from tools.download_weights import address, main
from utils.errors import UserError
from utils.published_weights import BAAI, EVA_REPOSITORY, OPENAI, PUBLISHED_FILES, PublishedFile

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()
EVA = "EVA02_CLIP_L_psz14_s4B.pt"


class Server(ThreadingHTTPServer):
    """Serves `content`. `cut`: bytes after which the connection ends; `ranges`: whether Range headers are obeyed."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.status, self.asked = CONTENT, None, True, 200, []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.asked.append((self.path, wanted))
        if "/resolve/" in self.path:  # the Hugging Face Hub leads to another server
            self.send_response(302)
            self.send_header("Location", f"/store{self.path.replace('/resolve/', '/')}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and self.server.ranges else 0
        if self.server.status != 200:
            return self.send_error(self.server.status)
        if wanted and start >= len(self.server.content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.server.content) - start))
        self.end_headers()
        self.wfile.write(self.server.content[start : self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setattr(download_weights, "OPENAI_ADDRESS", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setitem(PUBLISHED_FILES, "ViT-B/16", PublishedFile("ViT-B-16.pt", SHA256, OPENAI))
        monkeypatch.setitem(PUBLISHED_FILES, "EVA02-CLIP-L-14", PublishedFile(EVA, SHA256, BAAI))
        yield server
        server.shutdown()


@pytest.fixture
def fetch(tmp_path):
    return lambda: main(["ViT-B/16", "--dir", str(tmp_path / "weights")])


@pytest.fixture
def weights(tmp_path):
    """The path of the downloaded file."""
    return tmp_path / "weights" / "ViT-B-16.pt"


def part_of(weights):
    return weights.with_name("ViT-B-16.pt.part")


def test_the_table_holds_the_file_of_every_architecture_and_a_hash():
    """The names are written twice, so that a download does not import torch."""
    files = {arch: (file.name, file.publisher) for arch, file in PUBLISHED_FILES.items()}
    assert files == {arch: (a.weight_file, a.publisher) for arch, a in ARCHITECTURES.items()}
    assert all(re.fullmatch(r"[0-9a-f]{64}", file.sha256) for file in PUBLISHED_FILES.values())


def test_the_readme_names_every_file_and_hash():
    readme = Path("clip_pretrain/README.md").read_text()
    for arch, file in PUBLISHED_FILES.items():
        assert f"| {arch} | `{file.name}`" in readme and f"| `{file.name}` | `{file.sha256}` |" in readme


def test_a_file_arrives_whole_and_is_not_fetched_twice(server, fetch, weights, capsys):
    fetch()
    assert weights.read_bytes() == CONTENT and os.listdir(weights.parent) == [weights.name]
    assert server.asked == [(f"/{SHA256}/ViT-B-16.pt", None)]
    assert SHA256 in capsys.readouterr().out
    fetch()
    assert len(server.asked) == 1 and "already there" in capsys.readouterr().out


def test_a_cut_connection_keeps_what_arrived_and_the_next_run_goes_on(server, fetch, weights):
    server.cut = 300_000
    with pytest.raises(UserError, match=r"ViT-B-16.pt.part: .*300000 of 1048576 bytes; run the same command again"):
        fetch()
    assert part_of(weights).read_bytes() == CONTENT[:300_000] and not weights.exists()
    server.cut = None
    fetch()
    assert weights.read_bytes() == CONTENT and not part_of(weights).exists()
    assert server.asked[1][1] == "bytes=300000-"


def test_a_server_without_ranges_sends_it_all_again(server, fetch, weights):
    weights.parent.mkdir()
    part_of(weights).write_bytes(b"x" * 5000)
    server.ranges = False
    fetch()
    assert weights.read_bytes() == CONTENT and server.asked[0][1] == "bytes=5000-"


def test_a_part_that_is_whole_already_only_gets_its_name(server, fetch, weights):
    weights.parent.mkdir()
    part_of(weights).write_bytes(CONTENT)
    fetch()
    assert weights.read_bytes() == CONTENT and not part_of(weights).exists()


@pytest.mark.parametrize("start", [b"", b"wrong", b"too long" * 200_000])
def test_a_wrong_file_is_removed_so_that_the_next_run_starts_clean(server, fetch, weights, start):
    weights.parent.mkdir()
    part_of(weights).write_bytes(start)
    server.content = CONTENT if start else CONTENT[::-1]
    with pytest.raises(UserError, match="not the published file .*removed"):
        fetch()
    assert os.listdir(weights.parent) == []
    server.content = CONTENT
    fetch()
    assert weights.read_bytes() == CONTENT


def test_another_file_of_that_name_is_left_alone(server, fetch, weights):
    weights.parent.mkdir()
    weights.write_bytes(b"mine")
    with pytest.raises(UserError, match="ViT-B-16.pt: is not the file of http.*move it away"):
        fetch()
    assert weights.read_bytes() == b"mine" and server.asked == []


@pytest.mark.parametrize("status", [404, 503])
def test_a_refusal_of_the_server_is_one_line_and_keeps_the_part(server, fetch, weights, status):
    weights.parent.mkdir()
    part_of(weights).write_bytes(CONTENT[:10])
    server.status = status
    with pytest.raises(UserError, match=f"http.*ViT-B-16.pt: the server answers {status} ") as caught:
        fetch()
    assert "\n" not in str(caught.value) and part_of(weights).read_bytes() == CONTENT[:10]


def test_no_network_and_no_disk_are_one_line(server, fetch, weights, monkeypatch):
    weights.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="ViT-B-16.pt.part: .*weights"):
        fetch()
    weights.parent.unlink()
    monkeypatch.setattr(download_weights, "OPENAI_ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(UserError, match="http://127.0.0.1:1/.*refused.*run the same command again"):
        fetch()


@pytest.mark.parametrize(
    "argv, message", [(["ViT-B16"], "ViT-B16: choose one of ViT-B/32, "), ([], "no name given: choose one of")]
)
def test_other_names_say_what_to_do_and_fetch_nothing(server, argv, message):
    with pytest.raises(UserError, match=message):
        main(argv)
    assert server.asked == []


@pytest.fixture
def fetch_eva(tmp_path):
    return lambda: main(["EVA02-CLIP-L-14", "--dir", str(tmp_path / "weights")])


@pytest.fixture
def eva_weights(tmp_path):
    return tmp_path / "weights" / EVA


def test_a_file_of_the_hub_goes_the_same_way_through_its_redirection(server, fetch_eva, eva_weights, capsys):
    server.cut = 300_000
    with pytest.raises(UserError, match=rf"{EVA}.part: .*300000 of 1048576 bytes; run the same command again"):
        fetch_eva()
    assert os.listdir(eva_weights.parent) == [f"{EVA}.part"]
    server.cut = None
    fetch_eva()
    assert eva_weights.read_bytes() == CONTENT and os.listdir(eva_weights.parent) == [EVA]
    hub, store = f"/{EVA_REPOSITORY}/resolve/main/{EVA}", f"/store/{EVA_REPOSITORY}/main/{EVA}"
    assert server.asked == [(hub, None), (store, None), (hub, "bytes=300000-"), (store, "bytes=300000-")]
    assert SHA256 in capsys.readouterr().out


def test_a_wrong_file_of_the_hub_is_removed_and_a_refusal_is_one_line(server, fetch_eva, eva_weights):
    server.content = CONTENT[::-1]
    with pytest.raises(UserError, match=f"http.*resolve/main/{EVA}: what arrived is not the published file .*removed"):
        fetch_eva()
    assert os.listdir(eva_weights.parent) == []
    server.status = 404
    with pytest.raises(UserError, match=f"http.*resolve/main/{EVA}: the server answers 404 "):
        fetch_eva()


def test_the_hubs_own_address_is_taken_without_a_mirror(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    file = PUBLISHED_FILES["EVA02-CLIP-L-14"]
    assert address(file) == f"https://huggingface.co/QuanSun/EVA-CLIP/resolve/main/{file.name}"


def test_the_list_is_printed_from_the_repository_root_without_torch():
    command = [sys.executable, "-X", "importtime", "tools/download_weights.py", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(f"{arch:24} {address(file)}\n" in done.stdout for arch, file in PUBLISHED_FILES.items())
    assert " torch\n" not in done.stderr
