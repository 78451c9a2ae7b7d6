"""The report of a test: its numbers against slow ones, its tables, and its page in a browser."""

import base64
import csv
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_untrained

import test as test_program
from engine.report import MOST_FRAMES, MOST_STRIPS, analyse, make_strips, ranks, write_report
from engine.scores import PartialScores, Scores
from engine.view_details import VideoDetails, view_sets
from utils.errors import DataError

HOSTILE = [
    "</script><script>throw 1</script>",
    "<img src=x onerror=throw(1)>",
    "a \"quoted\" & 'single' name",
    "=cmd|' /C calc'!A0",
    "\u202eright to left",
    "line\nbreak\0nul",
    "<!--",
    "{{x}} ${y} `z`",
]


def make_result(num_classes=8, videos=200, sets=((1, 1), (3, 1), (1, 2)), names=None, sure=2.0, unread=(3, 7), seed=0):
    """Scores of a model that confuses neighbours of a hidden order, and their details."""
    rng = np.random.default_rng(seed)
    hidden = rng.permutation(num_classes)
    place = np.argsort(hidden)
    labels = rng.integers(num_classes, size=videos)
    distance = np.abs(place[labels][:, None] - place)
    logits = rng.normal(size=(videos, num_classes)) + sure * np.exp(-distance) * 2
    scores = np.exp(2 * logits)
    scores = (scores / scores.sum(axis=1, keepdims=True)).astype(np.float32)
    scores[list(unread)] = np.nan
    protocol = {"dataset": "made", "test_crops": 3, "test_clips": 2, "num_segments": 4, "checkpoint": "m.pt"}
    paths = [f"folder/video {number}.mp4" for number in range(videos)]
    num_frames = rng.integers(5, 300, size=videos)
    thumbnails = np.zeros((videos, 4, 4, 4), np.float32)
    names = names or [f"class number {label}" for label in range(num_classes)]
    result = Scores(paths, labels, scores, np.zeros(videos, bool), names, protocol, num_frames, thumbnails)
    details = VideoDetails(videos, num_classes, 4, view_sets(3, 2, True)[: len(sets)])
    details.num_frames = num_frames
    noise = rng.random((videos, len(details.sets), num_classes)).astype(np.float32)
    details.set_scores = np.nan_to_num(scores)[:, None] + 0.1 * noise
    details.damaged = [(5, f"{paths[5]}: <i>damaged</i>")]
    details.unreadable = [(index, f"{paths[index]}: <b>broken</b>") for index in unread]
    return result, details


class Clips:
    """Stands for the data set: each video has six views of four frames of one colour."""

    def __init__(self, broken=()):
        self.broken = broken

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError("gone")
        clips = torch.zeros(6, 4, 3, 32, 32, dtype=torch.uint8)
        clips[4] = torch.arange(4).view(4, 1, 1, 1) * 60
        return {"clips": clips}


def written(folder, *made):
    write_report(folder, *made, Clips(), {"note": HOSTILE[0]})
    return (folder / "report.html").read_text(encoding="utf-8")


def slow_rank(scores, label):
    """Place of a label after a stable sort, from 1."""
    return sorted(range(len(scores)), key=lambda k: (-scores[k], k)).index(label) + 1


def test_numbers_are_those_of_a_count_video_by_video():
    result, details = make_result()
    result.scores[11] = result.scores[11][0]  # equal scores: the lower label wins
    numbers = analyse(result, details)
    unread = {index for index, _ in details.unreadable}
    rank = [9 if i in unread else slow_rank(row, result.labels[i]) for i, row in enumerate(result.scores.tolist())]
    assert numbers.rank.tolist() == rank == ranks(result.scores, result.labels).tolist()
    assert (numbers.top1.right, numbers.top1.n) == (rank.count(1), 200)
    assert numbers.top5.right == sum(place <= 5 for place in rank)
    for item in numbers.classes:
        own = [i for i in range(200) if result.labels[i] == item.label]
        assert (item.top1.right, item.top1.n) == (sum(rank[i] == 1 for i in own), len(own))
        assert item.predicted == (numbers.predicted == item.label).sum()
        wrong = [int(numbers.predicted[i]) for i in own if i not in unread and rank[i] > 1]
        if wrong:
            assert wrong.count(item.taken_for[0]) == item.taken_for[1] == max(map(wrong.count, wrong))
    share = np.mean([item.top1.right / item.top1.n for item in numbers.classes])
    assert numbers.mean_class[0] == pytest.approx(share) and numbers.mean_class[1].low < share
    assert numbers.confusion.sum() == 198 and numbers.confusion.trace() == numbers.top1.right
    assert sum(share.n for *_, share in numbers.lengths) == 198 and len(numbers.lengths) == 5
    lengths = [bound for group in numbers.lengths for bound in group[:2]]
    assert lengths == sorted(lengths)
    margins = [result.scores[i, numbers.predicted[i]] - result.scores[i, result.labels[i]] for i in numbers.errors]
    assert margins == sorted(margins, reverse=True) and len(margins) == 198 - numbers.top1.right
    assert [(s.crops, s.clips) for s, _ in numbers.views] == [(1, 1), (3, 1), (1, 2), (3, 2)]


def test_sets_of_views_are_centre_crops_and_the_clip_of_a_test_with_one_clip():
    assert [s.views for s in view_sets(3, 4, first_clip=True)] == [(8,), (0, 4, 8), (8, 9, 10, 11)]
    assert [s.views for s in view_sets(3, 3, first_clip=False)] == [(7,), (1, 4, 7), (6, 7, 8)]
    assert [s.views for s in view_sets(10, 1, first_clip=True)] == [(4,)]
    assert view_sets(1, 1, first_clip=True) == []


def test_the_tables_hold_every_class_every_pair_and_every_video(tmp_path):
    result, details = make_result(names=HOSTILE)
    written(tmp_path, result, details)
    tables = {}
    for name in ("per_class", "confusion", "videos"):
        with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            tables[name] = list(csv.DictReader(file))
    numbers = analyse(result, details)
    assert [row["class"] for row in tables["per_class"]] == HOSTILE
    assert sum(int(row["right"]) for row in tables["per_class"]) == numbers.top1.right
    counts = [[int(row[name]) for name in HOSTILE] for row in tables["confusion"]]
    assert np.array_equal(counts, numbers.confusion)
    assert sum(int(row["not read"]) for row in tables["confusion"]) == 2
    assert [row["path"] for row in tables["videos"]] == result.paths
    assert sum(row["right"] == "1" for row in tables["videos"]) == numbers.top1.right
    assert [i for i, row in enumerate(tables["videos"]) if row["error"]] == [3, 7]
    assert [i for i, row in enumerate(tables["videos"]) if row["damage"]] == [5]
    assert not list(tmp_path.glob(".*"))


def test_strips_show_the_centre_view_and_stay_few_and_small():
    strips = make_strips(Clips(broken={1}), range(40), view=4)
    assert len(strips) == MOST_STRIPS - 1 and {strip.shown for strip in strips} == {4}
    picture = np.asarray(Image.open(io.BytesIO(strips[0].jpeg)))
    assert picture.shape == (112, 4 * 112 + 3 * 2, 3)
    assert [int(picture[56, 57 + 114 * t].mean()) for t in range(4)] == pytest.approx([0, 60, 120, 180], abs=3)
    (long,) = make_strips({0: {"clips": torch.zeros(1, 32, 3, 8, 8, dtype=torch.uint8)}}, [0], view=0)
    assert long.shown == MOST_FRAMES


def test_nothing_of_the_data_is_markup_and_nothing_comes_from_elsewhere(tmp_path):
    page = written(tmp_path, *make_result(names=HOSTILE))
    elements = []
    parser = HTMLParser()
    parser.handle_starttag = parser.handle_startendtag = lambda tag, attributes: elements.append((tag, attributes))
    parser.feed(page)
    linked = [value for _, attributes in elements for name, value in attributes if name in ("src", "href", "action")]
    assert len(linked) > 10 and all(value.startswith(("data:image/jpeg;base64,", "#")) for value in linked)
    tags = [tag for tag, _ in elements]
    assert tags.count("script") == 2 and not {"link", "iframe", "object", "base", "form", "b2"} & set(tags)
    assert tags.count("img") == page.count("data:image/jpeg") and "onerror" not in dict(
        sum((a for _, a in elements), [])
    )
    assert "@import" not in page and "url(" not in page
    assert (
        "<img src=x" not in page
        and "<b>broken" not in page
        and "<i>damaged" not in page
        and "\u202e" not in page
        and "\0" not in page
    )
    assert html.escape(HOSTILE[0]) in page
    (data,) = re.findall(r'id="matrix-data">(.*?)</script>', page)
    assert json.loads(data)["names"][:4] == HOSTILE[:4]


@pytest.mark.parametrize("num_classes", [2, 5, 6])
def test_top_5_is_left_out_where_it_says_nothing(tmp_path, num_classes):
    page = written(tmp_path, *make_result(num_classes=num_classes))
    assert ("Top-5" in page) == (num_classes > 5)
    assert ("top5" in (tmp_path / "per_class.csv").read_text()) == (num_classes > 5)


def test_a_test_without_errors_shows_the_least_certain_answers_instead(tmp_path):
    result, details = make_result(unread=(), sure=50)
    page = written(tmp_path, result, details)
    assert "Least certain answers" in page and "Worst errors" not in page and "No class was taken" in page


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>
const said = {errors};
const names = (table) => [...document.querySelectorAll(`#${table} tbody tr`)].filter((row) => !row.hidden)
  .map((row) => row.cells[1].textContent);
const sorted = (column) => {
  document.querySelectorAll("#class-table th button")[column].click();
  return [...document.querySelectorAll("#class-table tbody tr")].map((row) => row.cells[column].dataset.value ||
    row.cells[column].textContent);
};
addEventListener("load", () => {
  said.byVideos = sorted(2).map(Number);
  said.byVideosDown = sorted(2).map(Number);
  said.byName = sorted(1);
  const field = document.querySelector('input[data-table="class-table"]');
  field.value = "NUMBER 17";
  field.dispatchEvent(new Event("input"));
  said.found = names("class-table");
  said.count = document.querySelector('output[data-count="class-table"]').textContent;
  said.overview = !document.getElementById("overview").hidden;
  document.querySelector("button.show").click();
  said.readout = document.getElementById("readout").textContent;
  said.chosen = document.querySelector("#detail .chosen").textContent;
  said.part = document.querySelectorAll("#detail tbody tr").length;
  const result = document.createElement("pre");
  result.id = "said";
  result.textContent = btoa(unescape(encodeURIComponent(JSON.stringify(said))));
  document.body.append(result);
});
</script>"""
CATCH = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("securitypolicyviolation", (event) => errors.push(event.violatedDirective));
console.error = console.warn = (...words) => errors.push(words.join(" "));
</script>"""


def in_browser(path):
    """What the probe says about a page that is opened from the disk."""
    page = path.read_text(encoding="utf-8")
    page = page.replace("<title>", CATCH + "<title>", 1).replace("</body>", PROBE + "</body>")
    probed = path.with_name("probed.html")
    probed.write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={path.parent / 'profile'}", probed.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    (said,) = re.findall(r'<pre id="said">(.*?)</pre>', done.stdout) or [done.stderr]
    return json.loads(base64.b64decode(said))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("num_classes", [8, 40])
def test_in_a_browser_the_page_sorts_filters_and_shows_the_matrix_without_an_error(tmp_path, num_classes):
    names = HOSTILE if num_classes == 8 else None
    result, details = make_result(num_classes=num_classes, videos=30 * num_classes, names=names, sure=1.0)
    written(tmp_path, result, details)
    said, numbers = in_browser(tmp_path / "report.html"), analyse(result, details)
    assert said["errors"] == []
    assert said["byVideos"] == sorted(said["byVideos"]) == said["byVideosDown"][::-1]
    if names is None:
        assert said["byName"] == [f"class number {label}" for label in range(40)]  # 9 before 10
        found = {item.label for item in numbers.classes if 17 in (item.label, *(item.taken_for or ())[:1])}
        assert {int(name.split()[-1]) for name in said["found"]} == found and 17 in found
    assert said["count"] == f"{len(said['found'])} of {num_classes}"
    off = numbers.confusion - np.diag(np.diag(numbers.confusion))
    assert int(said["chosen"]) == off.max() and f": {off.max()} of " in said["readout"]
    assert said["overview"] == (num_classes > 14) and said["part"] == min(14, num_classes)


@pytest.fixture
def tested(config, tmp_path):
    save_untrained(config, tmp_path / "m.pt")
    return ["--config", config, "--weights", str(tmp_path / "m.pt"), "--test_crops", "3", "--test_clips", "2"]


def test_test_py_writes_the_report_of_its_scores(tested, tmp_path, capsys):
    folder = tmp_path / "deep" / "report"
    test_program.main([*tested, "--report", str(folder), "--save_scores", str(tmp_path / "s.npz")])
    assert capsys.readouterr().out.splitlines()[-2].endswith(f"report: {folder}/report.html")
    assert sorted(path.name for path in folder.iterdir()) == [
        "confusion.csv", "per_class.csv", "report.html", "videos.csv"
    ]  # fmt: skip
    page, scores = (folder / "report.html").read_text(), np.load(tmp_path / "s.npz")
    protocol = json.loads(str(scores["protocol"]))
    assert protocol["model_sha256"] in page and "data:image/jpeg;base64," in page and "torch" in page
    right = (scores["scores"].argmax(1) == scores["labels"]).sum()
    assert f"{100 * right / 7:.2f} %" in page
    assert scores["num_frames"].tolist() == [6] * 7 and scores["thumbnails"].shape == (7, 4, 4, 4)
    # The frames of the first set are those of a test with one view: on square frames, so are its scores.
    test_program.main([*tested[:4], "--save_scores", str(tmp_path / "one.npz")])
    one = np.load(tmp_path / "one.npz")
    right = (one["scores"].argmax(1) == one["labels"]).sum()
    views = re.search(r"<td>1 crop x 1 clip</td>.*?data-value=\"1\".*?data-value=\"([\d.]+)\"", page)
    assert float(views[1]) == pytest.approx(100 * right / 7)
    assert np.array_equal(one["thumbnails"], scores["thumbnails"])


def test_a_test_that_was_interrupted_gives_the_report_of_an_unbroken_one(tested, tmp_path, monkeypatch):
    scores, add, seen = ["--save_scores", str(tmp_path / "s.npz")], PartialScores.add, []

    def interrupted(self, indices, *rows):
        add(self, indices, *rows)
        seen.extend(indices)
        if len(seen) == 4:
            raise KeyboardInterrupt

    test_program.main([*tested, "--report", str(tmp_path / "whole")])
    with monkeypatch.context() as patch:
        patch.setattr(PartialScores, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            test_program.main([*tested, *scores])
    test_program.main([*tested, *scores, "--report", str(tmp_path / "resumed")])
    for name in ("per_class.csv", "confusion.csv", "videos.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "resumed" / name).read_text()
    whole, resumed = ((tmp_path / name / "report.html").read_text() for name in ("whole", "resumed"))
    assert re.findall(r'<table id="views-table".*?</table>', whole, re.DOTALL) == re.findall(
        r'<table id="views-table".*?</table>', resumed, re.DOTALL
    )


def test_a_report_is_refused_before_the_test_where_it_cannot_be(tested, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--report .*file: is a file"):
        test_program.main([*tested, "--report", str(tmp_path / "file")])
    listed = tmp_path / "unlabelled.txt"
    listed.write_text("val_00000 6 -1\n")
    with pytest.raises(DataError, match=r"unlabelled.txt: no labels, which a report needs"):
        test_program.main([*tested, f"data.val_list={listed}", "--report", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_the_log_names_no_lowest_class_at_100_percent_and_no_top_5_of_five(caplog):
    caplog.set_level("INFO")
    protocol = {"num_segments": 4, "test_crops": 1, "test_clips": 1, "dense": False}
    result = SimpleNamespace(
        scores=np.eye(5), labels=np.arange(5), protocol=protocol, labelled=True, class_names=list("abcde")
    )
    test_program.report(result, 1.0)
    assert "top-1 100.00" in caplog.text and "lowest" not in caplog.text and "top-5" not in caplog.text
    result.labels = np.array([0, 1, 2, 3, 0])
    test_program.report(result, 1.0)
    assert "lowest top-1: a 50.00" in caplog.text and "b 100" not in caplog.text
