"""The documentation holds: what `docs/adding-a-backend.md` tells its reader to type works, in its order, and links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

SITTING = ROOT / "docs" / "adding-a-backend.md"
BLOCK = re.compile(r"^(?:`([^`\n]+)`:\n\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)  # the file's name, the language, the text
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "[!.]*/README.md") for path in ROOT.glob(pattern))


def blocks() -> list[tuple[str, str, str]]:
    return BLOCK.findall(SITTING.read_text(encoding="utf-8"))


def scratch_project(place: Path) -> Path:
    """The project with the reference as its only backend."""
    for name in ("base", "conformance", "data_sets", "formats", "measuring", "pages", "reference", "tests/golden"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run_training.sh", place)
    return place


@pytest.mark.long
def test_the_sitting_goes_as_it_is_written(tmp_path):
    """`sh` blocks are run, `text` blocks are lines of what the last of them printed, the others are the files named above them."""
    project = scratch_project(tmp_path / "project")
    env = {name: value for name, value in os.environ.items() if not name.startswith("SSD_")}
    env |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}", "PYTHONPATH": str(project), "SSD_PYTHON": sys.executable}
    printed, after = "", tmp_path / "environment"
    for name, language, text in blocks():
        if language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", f'{text}\nenv -0 > "$0"', str(after)]
            done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, timeout=500)
            printed = done.stdout
            assert done.returncode == 0, f"{text}ended with {done.returncode}:\n{printed[-3000:]}{done.stderr[-3000:]}"
            env = dict(line.split("=", 1) for line in after.read_text().split("\0") if line)
        elif language == "text":
            assert text.strip("\n") in printed.replace(" \n", "\n"), printed
        else:
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            (project / name).write_text(text, encoding="utf-8")


def test_every_block_is_run_compared_or_a_file():
    found = blocks()
    assert SITTING.read_text(encoding="utf-8").count("```") == 2 * len(found)
    assert {language for name, language, _ in found if not name} == {"sh", "text"}
    assert {"acme/backend.py", "acme/build.py", "acme/matcher.cpp", "acme/matcher.py"} <= {name for name, _, _ in found}


def anchors(document: Path) -> set[str]:
    """What a page's headings are called in links to them: lower case, without punctuation, - for a space."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for file, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", document.read_text(encoding="utf-8")):
        target = document.parent / file if file else document
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


def test_the_front_page_leads_to_every_page():
    linked = re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert set(linked) == {f"docs/{path.name}" for path in (ROOT / "docs").iterdir()}
