"""``python -m base new-backend``: what it writes works as it stands, and names that would not are refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from base.backend import SLOTS
from base.config import resolve
from tests.conftest import ROOT, SMALL, Started
from tests.test_docs import scratch_project

FILES = {"README.md", "backend.py", "config/ZETA2x1x1.yaml", "config/environment_variables.sh", "requirements.txt", "step.py"}


def new_backend(*arguments: object, project: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(project), env.pop("PYTHONPATH", "")])), **env}
    command = [sys.executable, "-m", "base", "new-backend", *map(str, arguments)]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.fixture
def outside(tmp_path):
    """A folder for backends outside the project, with backend zeta_2 in it, and what was said."""
    done = new_backend("zeta_2", "--dir", tmp_path / "a place", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return tmp_path / "a place", done.stdout


def test_every_file_has_the_new_name_and_can_be_used(outside):
    place, printed = outside
    folder = place / "zeta_2"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == FILES
    assert all(str(folder / file) in printed for file in FILES)
    everything = "".join((folder / file).read_text(encoding="utf-8") for file in FILES)
    assert not re.search("acme|todo|fixme", everything, re.IGNORECASE)
    assert 'device="cpu"' in everything and "class Zeta2Step" in everything
    assert resolve(folder, "ZETA2x1x1").config.batch_size == 32
    linted = subprocess.run([sys.executable, "-m", "ruff", "check", "--config", ROOT / "pyproject.toml", folder], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout + linted.stderr


def test_what_is_to_be_typed_next_trains(outside, tmp_path, demo_data):
    """Sourced, the environment's file makes the folder known, also a second time; a run then takes the step from it."""
    place, printed = outside
    source, train, verify = printed.rpartition(f"next, in {ROOT}:\n")[2].splitlines()
    assert train == "  bash run_training.sh --name zeta_2" and verify == "  python -m base verify --name zeta_2"
    script = f'{source}\n{source}\nprintf %s "$SSD_BACKEND_PATH"'
    environment = {**os.environ, "SSD_BACKEND_PATH": str(tmp_path)}
    sourced = subprocess.run(["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True).stdout
    assert sourced == os.pathsep.join([str(place), str(place), str(tmp_path)])
    flags = ["--name", "zeta_2", "--data_dir", str(demo_data), *SMALL, "--max_steps", "2", "--target", "null", "--workers", "0"]
    done = Started(tmp_path, [*flags, "--runs_dir", str(tmp_path), "--run_name", "own"], {"SSD_BACKEND_PATH": sourced}).wait_done()
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "own" / "environment.json").read_text())
    assert facts["components"] == {**dict.fromkeys(SLOTS, "reference"), "step": "zeta_2"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy that may be changed, as a folder within the project is found at once."""
    place = scratch_project(tmp_path_factory.mktemp("scaffold") / "project")
    (place / "docs").mkdir()
    shutil.copy(ROOT / "prepare.py", place)
    return place


def test_within_the_project_it_is_a_backend_at_once(project):
    done = new_backend("inside", project=project)
    assert done.returncode == 0 and "\n  source inside/config/environment_variables.sh\n" in done.stdout, done.stderr
    assert "SSD_BACKEND_PATH" not in (project / "inside" / "config" / "environment_variables.sh").read_text()
    listed = subprocess.run([sys.executable, "-m", "base", "train", "--list"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert "\ninside\n" in f"\n{listed}" and re.search(r"^inside\n  INSIDEx1x1 +MLPerf reference's recipe on one inside device\.$", listed, re.M)
    again = new_backend("inside", project=project)
    assert again.returncode == 2 and again.stderr == f"error: the name 'inside' is taken by {project / 'inside'}; choose another\n"


@pytest.mark.parametrize("name", ["base", "tests", "docs", "reference", "prepare", "build", "data", "runs", "my-chip", "1st", "class", "a/b", ""])
def test_names_that_would_not_work_are_refused_and_nothing_is_written(project, name):
    before = sorted(project.rglob("*.py"))
    done = new_backend(name, project=project)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and f"{name!r}" in done.stderr and "choose another" in done.stderr
    assert "Traceback" not in done.stderr and sorted(project.rglob("*.py")) == before


def test_names_of_the_project_are_refused_outside_it_too(project, tmp_path):
    for name in ("base", "reference", "prepare"):
        done = new_backend(name, "--dir", tmp_path / "outside", project=project)
        assert done.returncode == 2 and f"the name {name!r} is taken by {project / name}" in done.stderr
    assert not (tmp_path / "outside").exists()


def test_an_installed_package_keeps_its_modules(project, tmp_path):
    """One with an __init__.py is found before a folder at the project's root; one without would be mixed with it."""
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "step.py").write_text("OWNER = 'the package'\n")
    (tmp_path / "whole" / "__init__.py").touch()
    done = new_backend("parts", project=project, PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and f"the name 'parts' is that of an installed package in {tmp_path / 'parts'}" in done.stderr
    assert new_backend("whole", project=project, PYTHONPATH=str(tmp_path)).returncode == 0
    script = "import whole.step; from base.backend import load_backend; print(whole.step.OWNER, load_backend('whole').suppliers['step'])"
    environment = {**os.environ, "PYTHONPATH": f"{project}{os.pathsep}{tmp_path}"}
    printed = subprocess.run([sys.executable, "-c", script], cwd=project, env=environment, capture_output=True, text=True, check=True).stdout
    assert printed == "the package whole\n"


@pytest.mark.parametrize("device", ["cuda:0", "GPU", "", "no such"])
def test_a_device_is_a_type(tmp_path, device):
    done = new_backend("acme_two", "--dir", tmp_path, "--device", device)
    assert done.returncode == 2 and f"--device {device!r} is not a torch device type" in done.stderr and not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    done = new_backend("acme_two", "--dir", tmp_path / "file")
    assert done.returncode == 2 and f"error: {tmp_path / 'file'}" in done.stderr and "choose another --dir" in done.stderr
