"""Every bad input of tests/bad_input.py ends with its one line, and nothing is written."""

import re

import bad_input
import pytest

CASES = bad_input.all_cases()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_input")
    bad_input.make_base(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    return []


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.section}: {case.what}".replace("/", " "))
def test_bad_input_ends_with_one_line_and_writes_nothing(case, base, rows):
    status, line, left = bad_input.run(case, base)
    rows.append((case, status, line))
    # Frames and videos are read in the first step: by then the run has its folder, and its log says what happened.
    begun = ["run", "run/config.yaml", "run/train.log"]
    assert left == [] or (left == begun and re.search(r"\.(jpg|mp4|zip): ", line)), left
    assert (status, line.startswith("error: ")) == (1, True) or (status == 2 and ": error: " in line), line
    assert len(line) < 700 and line.isprintable()


def test_the_page_of_errors_is_what_the_programs_say(rows):
    if len(rows) < len(CASES):
        pytest.skip("not all cases have run")
    assert len(CASES) >= 120
    assert bad_input.PAGE.read_text(encoding="utf-8") == bad_input.page(rows), (
        "run python tests/bad_input.py > docs/errors.md"
    )
