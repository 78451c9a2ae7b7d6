"""What the pages say about the repository: figure, links, tree, version, workflow."""

import re
import subprocess
from pathlib import Path

import pages
import pytest
import yaml

from tools import draw_method
from utils.version import VERSION

ROOT = Path(__file__).parent.parent


def test_the_figure_is_the_one_that_the_script_prints():
    assert (ROOT / "docs/method.svg").read_text(encoding="utf-8") == draw_method.figure()


@pytest.mark.parametrize("page", pages.ALL)
def test_every_relative_link_leads_to_a_file(page):
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", pages.read(page))
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_tree_of_the_readme_names_every_folder_and_program():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^```\n(train\.py .*?)^```$", readme, flags=re.MULTILINE | re.DOTALL)
    named = {name for line in tree.splitlines() for name in re.split(r"\s{2,}", line)[0].split()}
    ours = {f"{path.parent.name}/" for path in ROOT.glob("[!.]*/*") if path.suffix in (".py", ".yaml", ".sh", ".md")}
    assert {path.name for path in ROOT.glob("*.py")} <= named
    assert ours - {"data/", "demo_data/", "exp_onehot/"} <= named and all((ROOT / name).exists() for name in named)


def test_citation_and_changelog_have_the_version_of_the_project():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    releases = re.findall(r"^## \[(\d[^\]]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == releases[0] == VERSION


def test_the_workflow_runs_the_test_script_on_the_oldest_python_that_the_code_is_checked_for():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["tests"]
    assert job["steps"][-1] == {"run": "sh scripts/run_tests.sh"}
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    oldest = job["strategy"]["matrix"]["python"][0]
    assert f'python_version = "{oldest}"' in settings and f'target-version = "py{oldest.replace(".", "")}"' in settings


def test_the_repository_holds_no_link():
    """A tracked link leads to a path of the machine on which it was made."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [line for line in tracked.stdout.splitlines() if line.startswith("120000")]
    ignored = subprocess.run(["git", "check-ignore", ".venv"], cwd=ROOT, capture_output=True, text=True)
    assert ignored.stdout.strip() == ".venv", "a pattern .venv/ does not ignore a link of that name"
