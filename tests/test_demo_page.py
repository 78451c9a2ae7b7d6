"""The page of tools/demo_page.py: what it shows, what it refuses, and that nothing of an upload stays."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny import REPOSITORY

from datasets.decoders import upright_frames
from datasets.sampling import sample_test
from datasets.transforms import EvalTransform
from inference import Recognizer
from inference.page import (
    Answer,
    Limits,
    answer_html,
    answers,
    check_upload,
    introduction_html,
    recognise,
    remove_older,
    timelines,
)
from inference.stream import Timeline, describe_segments
from inference.timeline_plot import timeline_png
from tools import demo_page
from utils.errors import ConfigError, DataError, UserError

LIMITS = Limits(max_mb=1, max_seconds=10)


@pytest.fixture
def upload(motion_root, tmp_path):
    """upload(name) -> path of a video of six frames in 0.6 s, in a folder of its own."""

    def copy(name="a.mp4", content=None):
        path = tmp_path / "uploads" / "0a" / name
        path.parent.mkdir(parents=True)
        if content is None:
            shutil.copy(motion_root / "videos" / "val_00000.mp4", path)
        else:
            path.write_bytes(content)
        return path

    return copy


def pictures_in(html):
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_frames_on_the_page_are_the_pixels_that_enter_the_model(recognizer, upload):
    path, data = upload(), recognizer.config.data
    every = list(upright_frames(path))
    indices = sample_test(len(every), data.num_segments, data.protocol)[0].tolist()
    expected = EvalTransform(data.input_size, data.resize)([every[index] for index in indices])[0]
    answer = recognise(recognizer, str(path), topk=3)
    assert answer.num_frames == 6 and answer.frames == indices
    assert np.array_equal(answer.pixels, expected.permute(0, 2, 3, 1).numpy())
    shown = pictures_in(answer_html("a.mp4", 0.6, answer))
    assert np.array_equal(np.stack(shown), answer.pixels) and len(np.unique(answer.pixels)) > 50


def test_the_bars_are_the_scores_that_the_recognizer_gives(recognizer, upload):
    path = str(upload())
    answer = recognise(recognizer, path, topk=3)
    assert answer.top == recognizer.predict(path, topk=3)
    html = answer_html("a.mp4", 0.6, answer)
    assert re.findall(r'<div style="width: ([\d.]+)%', html) == [f"{100 * score:.2f}" for _, score in answer.top]
    assert re.findall(r'title="([^"]+)"', html) == [name for name, _ in answer.top]


def test_a_long_video_gets_the_time_line_of_its_stream(recognizer, upload):
    path = str(upload())
    *progress, last = timelines(recognizer, path, window=0.2, seconds=0.6)
    stream = recognizer.stream(path, 0.2)
    timeline, windows = Timeline(stream.stride), list(stream)
    for found in windows:
        timeline.add(found)
    segments = describe_segments(timeline.segments(), recognizer.class_names)
    content = timeline_png(windows, segments, recognizer.class_names)
    assert np.array_equal(pictures_in(last)[0], np.array(Image.open(io.BytesIO(content))))
    assert all(segment["name"] in last for segment in segments)
    shares = [int(re.search(r'<div style="width: (\d+)%', html)[1]) for html in progress]
    assert shares[0] == 0 and shares[-1] == 100 and shares == sorted(set(shares)) and len(shares) > 2


def test_the_answer_comes_first_then_the_time_line_and_the_upload_is_removed(recognizer, upload):
    path = upload()
    first, *_, last = answers(recognizer, str(path), LIMITS, window=0.2, topk=2)
    assert len(pictures_in(first[0])) == 4 and "progressbar" in first[1]
    assert last[0] == first[0] and len(pictures_in(last[1])) == 1
    assert not path.parent.exists()


def test_a_short_video_gets_no_time_line(recognizer, upload):
    ((answer, note),) = answers(recognizer, str(upload()), LIMITS, window=0.4, topk=2)
    assert len(pictures_in(answer)) == 4 and "Videos of 0.8 s or more also get a time line." in note


@pytest.mark.parametrize(
    ("name", "content", "limits", "line"),
    [
        ("a.mp4", None, Limits(0.0001, 10), r"a\.mp4: has 0\.0 MB, and this page takes at most 0\.0001 MB"),
        ("a.mp4", None, Limits(1, 0.5), r"a\.mp4: longer than the 0\.5 s that this page takes"),
        ("a.mp4", b"", LIMITS, r"a\.mp4: is no video file that can be read here, or a damaged one"),
        ("a.mp4", b"hello", LIMITS, r"a\.mp4: is no video file that can be read here, or a damaged one"),
        ("&lt;b&gt;.mp4", b"hello", LIMITS, r"&amp;lt;b&amp;gt;\.mp4: is no video file .*"),
    ],
)
def test_what_is_refused_gets_one_line_and_is_removed(recognizer, upload, name, content, limits, line):
    path = upload(name, content)
    ((answer, timeline),) = answers(recognizer, str(path), limits, window=0.2, topk=2)
    assert re.fullmatch(f'<p class="error" role="alert">{line}</p></div>', answer.split("</style>")[1])
    assert timeline == "" and not path.parent.exists()


def test_a_play_list_leads_to_no_other_file(upload, motion_root):
    path = upload("a.mp4", b"ffconcat version 1.0\nfile others/b.mp4\n")
    (path.parent / "others").mkdir()
    shutil.copy(motion_root / "videos" / "val_00000.mp4", path.parent / "others" / "b.mp4")
    with pytest.raises(DataError, match=r"^a\.mp4: is no video file that can be read here, or a damaged one$"):
        check_upload(str(path), LIMITS)


def test_a_video_that_breaks_in_its_middle_keeps_its_answer(recognizer, upload, monkeypatch):
    path = upload()

    def broken(*_):
        yield "so far"
        raise DataError(f"{path}: cannot be read further")

    monkeypatch.setattr("inference.page.timelines", broken)
    *_, (answer, line) = answers(recognizer, str(path), LIMITS, window=0.2, topk=2)
    assert len(pictures_in(answer)) == 4 and ">a.mp4: cannot be read further<" in line
    assert not path.parent.exists()


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_an_upload_is_removed_when_its_answer_ends_early(recognizer, upload, monkeypatch, how):
    path = upload()
    running = answers(recognizer, str(path), LIMITS, window=0.2, topk=2)
    if how == "closed":
        next(running)
        assert path.exists()
        running.close()
    else:
        monkeypatch.setattr("inference.page.recognise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(running)
    assert not path.parent.exists()


def test_the_length_is_that_of_the_packets(upload):
    path = upload()
    assert check_upload(str(path), LIMITS) == pytest.approx(0.6)
    path.unlink()
    with pytest.raises(DataError, match=r"^a\.mp4: the file is no longer there; drop it again$"):
        check_upload(str(path), LIMITS)


def test_names_cannot_add_to_the_page(recognizer, checkpoint):
    name = "<script>x</script>"
    recognizer.class_names = [name, *recognizer.class_names[1:]]
    answer = Answer(1, [(name, 0.5)], [0], np.zeros((1, 4, 4, 3), np.uint8))
    for html in (introduction_html(recognizer, str(checkpoint), LIMITS), answer_html(name, 1.0, answer)):
        assert "<script>" not in html and "&lt;script&gt;" in html


def test_uploads_without_an_answer_are_removed_after_a_while(upload, tmp_path):
    path = upload()
    os.utime(path, (1000, 1000))
    young = tmp_path / "uploads" / "1b" / "b.mp4"
    young.parent.mkdir()
    young.write_bytes(b"")
    remove_older(str(tmp_path / "uploads"), time.time() - 60)
    assert not path.exists() and young.exists()


def test_without_gradio_one_line_names_the_file(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ConfigError) as raised:
        demo_page.main([str(checkpoint)])
    file = re.search(r"pip install -r (\S+)$", raised.value.line)[1]
    assert re.search(r"^gradio>=\d", (REPOSITORY / file).read_text(), re.MULTILINE)


def test_only_this_machine_can_open_the_page_unless_told_otherwise():
    assert demo_page.parse(["x"]).host == "127.0.0.1"
    with demo_page.listen("127.0.0.1", 0) as server:
        host, port = server.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=rf"^--host, --port: 127\.0\.0\.1:{port} cannot be used \("):
            demo_page.listen("127.0.0.1", port)


@pytest.mark.parametrize("option", [["--max_mb", "0"], ["--max_seconds", "nan"], ["--window", "-1"], ["--port", "-1"]])
def test_limits_that_make_no_sense_are_refused(option, capsys):
    with pytest.raises(SystemExit):
        demo_page.parse(["x", *option])
    assert f"error: {option[0]}: must be " in capsys.readouterr().err


def test_the_command_of_the_documentation_is_understood():
    text = (REPOSITORY / "docs" / "prediction.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    python tools/demo_page\.py (.*)$", text, re.MULTILINE)
    args = demo_page.parse(command.split())
    assert args.checkpoint == "exp_onehot/demo" and args.window == 0.8
    section = text.split("### A page in the browser")[1].split("\n## ")[0]
    assert set(re.findall(r"`(--[a-z_]+)", section)) <= {"--set", *(f"--{name}" for name in vars(args))}


def files_with_content(folder):
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


def test_a_request_without_a_browser_is_answered_and_limited(checkpoint, upload, tmp_path):
    gradio = pytest.importorskip("gradio", reason="requirements-extras.txt is not installed")
    from starlette.testclient import TestClient

    args = demo_page.parse([str(checkpoint), "--window", "0.2", "--max_mb", "0.1", "--device", "cpu"])
    folder, path = tmp_path / "kept", upload()
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # so that it is restored
        page = demo_page.build_page(gradio, Recognizer.load(checkpoint), args, str(folder))
        with TestClient(demo_page.build_app(gradio, page, args.max_mb)) as client:
            assert client.get("/").headers["content-security-policy"].startswith("default-src 'self'")
            sent = client.post("/gradio_api/upload", files={"files": ("a.mp4", path.read_bytes())})
            (stored,) = sent.json()
            assert stored.startswith(str(folder)) and len(files_with_content(folder)) == 1
            data = [{"path": stored, "meta": {"_type": "gradio.FileData"}}]
            client.post("/gradio_api/queue/join", json={"data": data, "fn_index": 0, "session_hash": "s"})
            events = client.get("/gradio_api/queue/data", params={"session_hash": "s"}).text
            assert '"success":true' in events and "What the model saw" in events and "Time line" in events
            assert files_with_content(folder) == []
            large = client.post("/gradio_api/upload", files={"files": ("a.mp4", bytes(200_000))})
            assert large.status_code == 413 and files_with_content(folder) == []


class Browser:
    """Headless Chromium, by the DevTools protocol on a pair of pipes."""

    def __init__(self, program, folder):
        (reads, self._commands), (self._messages, writes) = os.pipe(), os.pipe()

        def connect():
            os.dup2(reads, 3)
            os.dup2(writes, 4)

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        options += ["--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            [program, *options],
            preexec_fn=connect,
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._received, self._number, self.requested, self._session = b"", 0, {}, {}
        (target,) = [t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def call(self, method, **arguments):
        self._number += 1
        command = {"id": self._number, "method": method, "params": arguments, **self._session}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                self._received += os.read(self._messages, 2**16)
            text, _, self._received = self._received.partition(b"\0")
            message = json.loads(text)
            if message.get("method") == "Network.requestWillBeSent":
                self.requested[message["params"]["requestId"]] = message["params"]["request"]["url"]
            if message.get("method") == "Network.loadingFailed" and message["params"].get("blockedReason") == "csp":
                self.requested.pop(message["params"]["requestId"])  # named by the page, and never sent
            if message.get("id") == self._number:
                return message["result"]

    def value(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait_for(self, expression):
        end = time.monotonic() + 120
        while not self.value(expression):
            assert time.monotonic() < end, self.value("document.body.innerText")
            time.sleep(0.1)

    def drop(self, path):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


def test_a_browser_shows_the_answer_and_asks_no_other_server(checkpoint, upload, tmp_path):
    pytest.importorskip("gradio", reason="requirements-extras.txt is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "tools/demo_page.py", str(checkpoint), "--port", "0", "--window", "0.2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True)
    browser = None
    try:
        found = (re.search(r"http://127\.0\.0\.1:\d+/", line) for line in server.stdout)  # Gradio 6.0 prints too
        address = next(filter(None, found))[0]
        browser = Browser(program, tmp_path / "profile")
        browser.call("Network.enable")
        browser.call("Page.navigate", url=address)
        browser.wait_for("!!document.querySelector('input[type=file]')")
        browser.drop(upload())
        browser.wait_for("!!document.querySelector('.timeline')")
        assert browser.value("document.querySelectorAll('.frames img').length") == 4
        assert browser.value("[...document.images].every(image => image.naturalWidth > 0)")
        assert "a.mp4" in browser.value("document.body.innerText")
        (text := tmp_path / "text.mp4").write_text("hello")
        browser.drop(text)
        browser.wait_for("document.body.innerText.includes('text.mp4: is no video file')")
        assert not browser.value("!!document.querySelector('.timeline')")
        (folder,) = (tmp_path / "tmp").glob("demo_page.*")
        assert files_with_content(folder) == []
        outside = [url for url in browser.requested.values() if not url.startswith((address, "data:", "blob:"))]
        assert len(browser.requested) > 5 and outside == []
    finally:
        if browser:
            browser.process.kill()
            browser.process.wait()
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    assert list((tmp_path / "tmp").glob("demo_page.*")) == []
