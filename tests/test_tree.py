"""The shape of the tree: how long its parts are, which rooms there are, and which of them a room imports."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

MOST_LINES = 400  # of a file
SOURCES = {".py", ".cpp", ".hpp", ".sh", ".sub", ".md", ".yaml", ".toml"}
WITHOUT_BOUND = {"docs/decisions.md"}  # a list that grows
# What a room may import beside itself. A backend may build on `reference` and, for the host's work, on `cpu`; never on an accelerator's.
IMPORTS = {
    "base": {"data_sets", "formats"},
    "base.tools": {"base", "data_sets", "formats", "reference"},
    "conformance": {"base", "base.tools", "data_sets", "measuring", "reference"},
    "data_sets": {"base", "pages", "reference"},
    "formats": {"base"},
    "measuring": {"base", "base.tools", "data_sets", "pages"},
    "pages": {"base"},
    "planning": {"base", "base.tools", "measuring", "reference"},
    "prepare.py": {"base", "data_sets"},
    "report": {"base", "base.tools", "data_sets", "pages", "planning", "reference"},
    "submission": {"base", "base.tools"},
    "reference": {"base", "data_sets"},
    "cpu": {"base", "data_sets", "reference"},
}
OF_AN_ACCELERATOR = {"base", "cpu", "data_sets", "measuring", "reference"}


def tracked() -> list[Path]:
    """The project's files, with those that are new and not ignored."""
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"which files belong to the project is git's to say: {done.stderr.strip()}")
    return [Path(name) for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def lines(files: list[Path]) -> int:
    return sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)


def room_of(file: Path) -> str:
    if file.is_relative_to("base/tools/scaffold"):
        return file.parts[3]  # a backend like any other
    return "base.tools" if file.is_relative_to("base/tools") else file.parts[0]


def imported(file: Path, rooms: set[str], backends: set[str]) -> Iterator[str]:
    """Which of these a file imports by name. A backend's modules are below `base.backends`: `nvidia.dali` is a wheel's."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            match name.split("."):
                case ["base", "backends", backend, *_] if backend in backends:
                    yield backend
                case ["base", "tools", *_]:
                    yield "base.tools"
                case [room, *_] if room in rooms:
                    yield room


def test_no_file_and_no_part_is_longer_than_its_bound():
    files = [file for file in tracked() if file.suffix in SOURCES and str(file) not in WITHOUT_BOUND]
    assert {str(file): count for file in files if (count := lines([file])) > MOST_LINES} == {}
    of_base = [file for file in files if file.parts[0] == "base" and file.suffix == ".py"]
    tools = [file for file in of_base if file.is_relative_to("base/tools")]
    assert lines(sorted(set(of_base) - set(tools))) < 3000
    assert lines(tools) < 2500
    assert lines([Path("base/train.py")]) < 300


def test_readme_has_every_room_and_no_other():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tree,) = re.findall(r"^## How the folders hang together\n+```\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    rooms = {file.parts[0] for file in tracked() if file.suffix == ".py" and file.parts[1:]}
    assert set(re.findall(r"^(\w+)/ ", tree, re.MULTILINE)) == rooms


def test_a_room_imports_only_what_it_may():
    files = [file for file in tracked() if file.suffix == ".py" and "tests" not in file.parts]
    backends = {room_of(file) for file in files if file.name == "backend.py" and file.parts[:1] != ("base",)}
    rooms = {file.parts[0] for file in files} | {"tests"}
    strange = {}
    for file in files:
        room = room_of(file)
        may = IMPORTS.get(room, OF_AN_ACCELERATOR if (ROOT / file).with_name("backend.py").exists() else set())
        if wrong := set(imported(file, rooms - backends, backends)) - may - {room}:
            strange[str(file)] = wrong
    assert strange == {}
