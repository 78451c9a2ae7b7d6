"""The documentation: its index, its commands, and what it says of keys, log lines, figures and files."""

import ast
import functools
import re

import pages
import pytest
import timm
from tiny import REPOSITORY, write_video

from utils.config_schema import FIELDS
from utils.published_weights import PUBLISHED_FILES

# Pages whose commands leave something that a test file of their own looks at.
FOLLOWED_BY = {
    "docs/custom_data.md": "test_custom_data_page.py",
    "docs/prediction.md": "test_prediction_page.py",
    "docs/report.md": "test_report_page.py",
}
OTHERS = [page for page in pages.ALL if page not in FOLLOWED_BY]


def test_the_index_names_every_page_once_and_the_readme_the_index():
    links = re.findall(r"\]\(([^)#]+)\)", pages.read("docs/README.md"))
    named = [f"docs/{link}" for link in links if "/" not in link]
    assert sorted(named) == sorted(page for page in pages.ALL if page.startswith("docs/") and page != "docs/README.md")
    assert "(docs/README.md)" in pages.read("README.md")


def test_every_entry_of_the_index_is_a_link_and_a_sentence():
    entries = re.split(r"\n *(?:\d+\.|-) ", pages.read("docs/README.md"))[1:]
    assert entries and all(re.match(r"\[[^]]+\]\([^)]+\): \S", " ".join(entry.split())) for entry in entries)


@pytest.fixture(scope="module")
def follow(reader):
    """follow(page) does the commands of a page once, and gives (command, what it printed) of each."""
    return functools.cache(lambda page: pages.follow(page, reader))


@pytest.mark.parametrize("page", OTHERS)
def test_every_command_of_a_page_runs_or_has_arguments_that_its_parser_takes(page, follow):
    assert [command for command, _ in follow(page)] == pages.commands(page)


@pytest.mark.parametrize("page", pages.ALL)
def test_commands_in_the_text_of_a_page_have_arguments_that_their_parser_takes(page):
    for command in pages.other_commands(page):
        pages.parse(command)


@pytest.mark.parametrize("page, test_file", FOLLOWED_BY.items())
def test_a_page_with_a_test_of_its_own_is_followed_there(page, test_file):
    text = (REPOSITORY / "tests" / test_file).read_text()
    assert f'PAGE = "{page}"' in text and "pages.follow(PAGE, reader)" in text


def test_every_exception_is_still_needed():
    """A beginning in ONLY_PARSED, or a foreign command, that no page has any more."""
    found = [command for page in pages.ALL for command in (*pages.commands(page), *pages.other_commands(page))]
    assert [start for start in pages.ONLY_PARSED if not any(command.startswith(start) for command in found)] == []
    assert pages.FOREIGN - set(found) == set()


@pytest.mark.parametrize(
    "command",
    [
        "python tools/plan.py configs/k400/vitb16.yaml --gpuz 24GB",
        "python tools/plan.py configs/k400/vitb16.yaml solver.lrr=1",
        "python tools/plan.py configs/k400/gone.yaml --gpus two",
        "sh scripts/run_train_vision.sh CONFIG [--outputs DIR] [key=value ...]",
        "sh scripts/run_test_vision.sh CHECKPOINT --test_crops 4",
        "sbatch --nodes=2 scripts/slurm_train.sh configs/k400/vitb16.yaml --outs x",
        "docker run --gpus all IMAGE sh scripts/run_predict.sh a.pt",
        "NUM_GPU=2 sh scripts/run_train_vision.sh configs/k400/vitb16.yaml",
        "python -m torch.distributed.run --nproc 2 tools/gone.py",
        "python tools/prepare_data.py packs A B",
        "sh scripts/run_tests.sh tests/test_gone.py",
        "tensorboard --logdirs exp_onehot",
        "make all",
    ],
)
def test_a_command_that_would_fail_is_found(command):
    with pytest.raises((AssertionError, SystemExit, ModuleNotFoundError)):
        pages.parse(command)


WITH_PYTHON = [page for page in OTHERS if any(block.language == "python" for block in pages.blocks(page))]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_of_a_page_runs_after_its_commands(page, follow, reader, monkeypatch):
    follow(page)
    monkeypatch.chdir(reader)
    write_video(reader / "a.mp4")
    write_video(reader / "long.mp4", count=125)
    found: dict = {}
    for block in pages.blocks(page):
        if block.language == "python":
            exec(compile(block.text, page, "exec"), found)
    match page:
        case "docs/training.md":
            assert [epoch for epoch, *_ in found["curve"]] == [0, 1, 2] and len(found["steps"]) == 3
        case "docs/testing.md":
            assert 0 <= found["top1"] <= 1 and found["saved"]["scores"].shape == (pages.VAL_VIDEOS, 10)


@pytest.mark.parametrize("page", pages.ALL)
def test_every_key_that_a_page_names_exists(page):
    sections = "|".join({key.partition(".")[0] for key in FIELDS if "." in key})
    named = set(re.findall(rf"`({sections})\.(?!py\b)(\w+)(?=[`=: ])", pages.read(page)))
    old = {f"{section}.{name}" for section, name in named} - set(FIELDS)
    tables = pages.read("docs/configuration.md").partition("## Keys of older")[2]
    assert [key for key in old if f"`{key}`" not in tables] == []


def sources():
    skipped = {"tests", "docs", ".venv", "benchmarks"}
    return [path for path in REPOSITORY.rglob("*.py") if path.relative_to(REPOSITORY).parts[0] not in skipped]


def pattern(node: ast.AST) -> str | None:
    """A regular expression of what a text in the code can become, with a group for each value; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(?:%|[-+.\d]*[sdfger])", "(.*?)", re.escape(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join("(.*?)" if isinstance(part, ast.FormattedValue) else str(pattern(part)) for part in node.values)
    return None


@pytest.fixture(scope="module")
def messages():
    """Regular expressions of all texts in the code that say something beside values, and its texts of one word."""
    found, single = set(), set()
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = pattern(node)
            if text and text.isalpha():
                single.add(text)
            if text and len(re.findall(r"[a-z]{2,}", text)) >= 1 and len(re.sub(r"\(\.\*\?\)|\\", "", text)) >= 8:
                found.add(re.sub(r"^(;|,|\\ )+|(;|,|\\ )+$", "", text))
    return [re.compile(text) for text in found], single


def is_a_message(text: str, messages: tuple[list[re.Pattern], set[str]]) -> bool:
    """Whether the code can print a line: a text of it fits, and so do other texts, or short values, for its values.

    "..." in the line stands for any value. A value is of at most two words, beside those that are texts of their own.
    """
    if text.startswith("error: ") and is_a_message(text.removeprefix("error: "), messages):
        return True
    words = [word for word in text.split() if re.fullmatch(r"\W*[A-Za-z-]{2,}\W*", word)]
    if len([word for word in words if word.strip(",;:()") not in messages[1]]) <= 2:
        return True
    for message in messages[0]:
        found = message.fullmatch(text)
        if found and all(len(group) < len(text) and is_a_message(group, messages) for group in found.groups()):
            return True
    cuts = [text.split(between) for between in ("; ", ": ")]
    return any(len(parts) > 1 and all(is_a_message(part, messages) for part in parts) for parts in cuts)


LOG_PAGES = ["docs/troubleshooting.md", "docs/memory_and_speed.md", "docs/training.md", "docs/testing.md"]


@pytest.mark.parametrize("page", [*LOG_PAGES, "docs/getting_started.md"])
def test_every_line_of_a_log_that_a_page_shows_can_be_printed(page, messages):
    shown = [line for block in pages.blocks(page) if block.language == "" for line in block.text.splitlines()]
    assert [line for line in shown if not is_a_message(line, messages)] == [] and shown


def test_a_line_that_nothing_prints_is_found(messages):
    assert is_a_message("epoch ... done: loss ..., best top-1 ...", messages)
    assert not is_a_message("the loss is not a number at epoch ..., iteration ...", messages)


def numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w]|\.\d)", text.replace(",", ""))


def quoting_rows(page: str) -> list[tuple[str, str]]:
    """(row without its last cell, text of the result file that the last cell leads to) of the tables of a page."""
    rows = re.findall(r"^\|(.*)\| \[results\]\(\.\./(benchmarks/results/[^)]+)\) \|$", pages.read(page), re.MULTILINE)
    return [(row, (REPOSITORY / path).read_text(encoding="utf-8")) for row, path in rows]


def test_every_figure_that_is_quoted_stands_in_its_file():
    rows = quoting_rows("docs/memory_and_speed.md")
    assert len(rows) > 10
    for row, result in rows:
        missing = [number for number in numbers(row) if number not in numbers(re.sub(r"(?<=\d)x(?=\d)", " ", result))]
        assert missing == [], f"{row}: {missing}"


def test_the_readme_quotes_the_results():
    page = " ".join(pages.read("README.md").split())
    step = (REPOSITORY / "benchmarks/results/training_step_ViT-B-16.txt").read_text()
    (kept, time) = (
        re.findall(rf"^ +recompute +{number}", step, re.MULTILINE)[0]
        for number in (r"(\d+\.\d)", r"\d\.\d+ +(\d\.\d+)")
    )
    (textbook,) = set(re.findall(r"^    textbook +(\d+\.\d) +1/1", step, re.MULTILINE)[:1])
    assert f"keeps {kept} MiB a clip" in page and f"keeps {textbook} MiB" in page and f"takes {time} times" in page
    rows = re.findall(
        r"^(.*?): plain .*?ratio (\d+\.\d+) ", (REPOSITORY / "benchmarks/results/data_engine.txt").read_text(), re.M
    )
    for start, what in (
        ("train, ", "as many training clips"),
        ("train from video", "as many from video files"),
        (("validation", "test"), "as many views"),
    ):
        ratios = [float(ratio) for name, ratio in rows if name.startswith(start)]
        assert f"{min(ratios):.1f} to {max(ratios):.1f} times {what}" in page, (what, ratios)


def test_the_page_of_numerics_quotes_the_decoders():
    page = " ".join(pages.read("docs/numerics.md").split())
    results = (REPOSITORY / "benchmarks/results/decoders.txt").read_text()
    rows = dict(re.findall(r"^(.*?): plain decord .*?, pyav .*?\(ratio ([\d.]+)\)", results, re.MULTILINE))
    hevc = [ratio for name, ratio in rows.items() if name.startswith("HEVC")]
    others = sorted(ratio for name, ratio in rows.items() if not name.startswith("HEVC"))
    assert f"`pyav` is {others[0]} to {others[-1]} times as fast" in page and f"HEVC it is {hevc[0]} times" in page


def test_the_page_of_checkpoints_names_the_towers_and_timms_addresses():
    page = pages.read("docs/checkpoints.md")
    assert all(f"`{arch}`" in page for arch in PUBLISHED_FILES)
    rows = re.findall(r"^\| `timm/(\S+)` \| `(timm/\S+)` \| `(\S+)` \|$", page, re.MULTILINE)
    assert [arch for _, _, arch in rows] == list(PUBLISHED_FILES)
    for name, hub, _ in rows:
        assert timm.get_pretrained_cfg(name).hf_hub_id == hub
