"""prepare.py as people run it: a copy of the project, environments of its own, no network and no mocks.

The environment's site-packages hold one line that adds those of the Python that runs the tests, so that installing
takes seconds and touches nothing outside the temporary folder.
"""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = sysconfig.get_path("purelib")


def copy_project(place: Path) -> Path:
    """What prepare.py needs, with a build backend that is already there (the real one would be downloaded)."""
    place.mkdir()
    for name in ("prepare.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, place)
    for name in ("reference", *(found.parent.name for found in ROOT.glob("*/__init__.py") if found.parent.name != "tests")):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "README.md").touch()
    (place / "build_here.py").write_text(f"import sys\nsys.path.append({SITE!r})\nfrom setuptools.build_meta import *\n")
    text = (place / "pyproject.toml").read_text()
    text = text.replace('requires = ["setuptools>=77"]', 'requires = []\nbackend-path = ["."]')
    (place / "pyproject.toml").write_text(text.replace("setuptools.build_meta", "build_here"))
    return place


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return copy_project(tmp_path_factory.mktemp("prepare") / "project")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An environment that sees the packages of the one that runs the tests, and may be changed."""
    place = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    subprocess.run([place / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)  # its own may be too old
    (next(place.glob("lib/*/site-packages")) / "more.pth").write_text(SITE + "\n")
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def vendor(tmp_path_factory):
    """An environment with pip and nothing else."""
    place = tmp_path_factory.mktemp("vendor") / "env"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place / "bin" / "python"


@pytest.fixture
def strangers(tmp_path):
    """Makes backends outside the project."""

    def make(name: str, build: str | None = None, requirements: str | None = None) -> None:
        folder = tmp_path / "strangers" / name
        folder.mkdir(parents=True)
        (folder / "backend.py").write_text(f"from base.backend import Backend\nBACKEND = Backend(name={name!r})\n")
        if build is not None:
            (folder / "build.py").write_text(build)
        if requirements is not None:
            (folder / "requirements.txt").write_text(requirements)

    make.path = tmp_path / "strangers"
    return make


def environ(strangers_path: Path | str = "") -> dict[str, str]:
    dropped = ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PIP_FIND_LINKS")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "SSD_BACKEND_PATH": str(strangers_path)}


def prepare(project: Path, *arguments: object, strangers: Path | str = "", exe: Path | str = sys.executable) -> subprocess.CompletedProcess:
    named = [] if "--name" in arguments else ["--name", "reference"]
    command = [exe, project / "prepare.py", *named, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(strangers), timeout=120)
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def test_unknown_backend_names_the_nearest(project):
    done = prepare(project, "--name", "refrence")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no backend is called 'refrence'; did you mean reference?")
    assert "base" not in done.stderr.split("there are:")[1]  # base/backend.py is the contract, not a backend


def test_check_without_environment_changes_nothing(project):
    before = sorted(map(str, project.iterdir()))
    done = prepare(project, "--check")
    assert done.returncode == 1 and ".venv is missing" in done.stdout and "fix: python3 prepare.py --name reference" in done.stdout
    assert sorted(map(str, project.iterdir())) == before


def test_check_names_every_fault_and_its_fix(project, strangers, tmp_path):
    strangers("elsewhere", build="import sys; sys.exit(3)", requirements="# a comment\nno-such-thing>=2.5  # why\nnumpy<1.0\n")
    arguments = ("--name", "elsewhere", "--check", "--python", sys.executable, "--data_dir", tmp_path / "none")
    done = prepare(project, *arguments, strangers=strangers.path)
    assert done.returncode == 1
    for fault in (
        "no-such-thing is not installed, this project needs no-such-thing>=2.5",
        "is installed, this project needs numpy<1.0",
        "ssd-zoo is not installed from",
        "the extensions of elsewhere are not built",
        f"data folder {tmp_path / 'none'} does not exist",
    ):
        assert fault in done.stdout
    assert done.stdout.count("fault: ") == done.stdout.count("  fix: ") == 5
    assert f"--name elsewhere --python {sys.executable}" in done.stdout


@pytest.mark.parametrize("arguments", ["--download", "--check --download --data_dir x", "--demo-data --download --data_dir x"])
def test_contradictions_are_refused(project, arguments):
    assert prepare(project, *arguments.split()).returncode == 2


def test_missing_data_is_told_before_anything_is_installed(project, tmp_path):
    done = prepare(project, "--data-dir", tmp_path / "none")
    assert done.returncode == 2 and "--download" in done.stderr and "--demo-data" in done.stderr
    assert not (project / ".venv").exists()


def test_python_that_does_not_work(project, tmp_path):
    done = prepare(project, "--python", tmp_path / "python")
    assert done.returncode == 2 and "no working Python there" in done.stderr


def test_first_run_second_run_check_and_a_changed_package(project, python):
    first = prepare(project, "--python", python)
    assert first.returncode == 0, first.stdout + first.stderr
    assert [line[:5] for line in first.stdout.splitlines() if line.startswith("[")] == ["[1/4]", "[2/4]", "[2/4]", "[3/4]", "[4/4]"]
    assert "Requirement already satisfied" not in first.stdout
    started = time.monotonic()
    second = prepare(project, "--python", python)
    assert time.monotonic() - started < 5
    assert second.returncode == 0 and len(second.stdout.splitlines()) == 1 and "everything is in place" in second.stdout
    checked = prepare(project, "--python", python, "--check")
    assert checked.returncode == 0 and checked.stdout.endswith("everything is in place\n"), checked.stdout

    site = next(python.parents[1].glob("lib/*/site-packages"))
    other = site / "rich-99.0.dist-info"  # somebody put another version in front
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: rich\nVersion: 99.0\n")
    noticed = prepare(project, "--python", python)
    assert noticed.returncode == 2 and "rich 99.0 is installed, constraints.txt allows rich==" in noticed.stdout
    assert "pip could not install" in noticed.stderr  # there is no index here
    shutil.rmtree(other)
    assert "everything is in place" in prepare(project, "--python", python).stdout


def test_waits_for_another_mends_what_was_uninstalled_and_builds_once(project, python, strangers):
    build = (
        "import pathlib, sys\nproduct = pathlib.Path(__file__).with_name('product')\n"
        "if '--check' in sys.argv: sys.exit(not product.exists())\n"
        "print('compiling'); product.write_text('x')\n"
    )
    strangers("builder", build=build, requirements="rich>=13\n")
    lock = python.parents[1] / ".ssd-zoo" / "lock"
    lock.parent.mkdir(exist_ok=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "ssd-zoo"], check=True, env=environ())
    command = [sys.executable, "-u", project / "prepare.py", "--name", "builder", "--python", python]
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ(strangers.path))
        assert "waiting for it" in process.stdout.readline()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "ssd-zoo is not installed from" in output and "  compiling" in output and "[4/4]" in output, output
    again = prepare(project, "--name", "builder", "--python", python, strangers=strangers.path)
    assert "everything is in place" in again.stdout and "compiling" not in again.stdout


def test_build_fails_with_its_last_lines(project, python, strangers):
    strangers("breaker", build="import sys\nprint('compiler: line 7: no')\nsys.exit(5)\n")
    done = prepare(project, "--name", "breaker", "--python", python, strangers=strangers.path)
    assert done.returncode == 2 and "ended with exit code 5" in done.stderr and "compiler: line 7: no" in done.stderr


def test_what_the_machine_lacks_for_a_build_is_told_before_anything_is_installed(project, strangers, vendor):
    strangers("lacking", build="import sys\nprint('no compiler: apt-get install it', file=sys.stderr)\nsys.exit(2)\n")
    done = prepare(project, "--name", "lacking", "--python", vendor, strangers=strangers.path)
    assert done.returncode == 2 and done.stderr == "error: no compiler: apt-get install it\n" and "packages" not in done.stdout
    checked = prepare(project, "--name", "lacking", "--check", "--python", vendor, strangers=strangers.path)
    assert checked.returncode == 1 and "fault: no compiler: apt-get install it" in checked.stdout


def test_backend_that_does_not_load(project, python, strangers):
    strangers("wrong")
    (strangers.path / "wrong" / "backend.py").write_text("import no_such_package\n")
    done = prepare(project, "--name", "wrong", "--python", python, strangers=strangers.path)
    assert done.returncode == 2 and "backend wrong fails" in done.stderr and "no_such_package" in done.stderr


def test_interrupted_then_recovers(project, python, strangers):
    flag = strangers.path.parent / "quick"
    build = (
        f"import pathlib, sys, time\nquick = pathlib.Path({str(flag)!r}).exists()\n"
        "if '--check' in sys.argv: sys.exit(not quick)\nprint('begun', flush=True)\ntime.sleep(0 if quick else 60)\n"
    )
    strangers("slow", build=build)
    command = [sys.executable, project / "prepare.py", "--name", "slow", "--python", python]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, env=environ(strangers.path), **pipes)
    while "begun" not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130 and errors.splitlines()[-1].startswith("interrupted: ")
    flag.touch()
    assert prepare(project, "--name", "slow", "--python", python, strangers=strangers.path).returncode == 0


def distribution(python: Path, name: str, version: str, *requires: str) -> None:
    folder = next(python.parents[1].glob("lib/*/site-packages")) / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {each}" for each in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def inspect(project: Path, python: Path, backend: Path = Path("/nowhere")) -> dict:
    call = f"print(json.dumps(installed.inspect({str(backend)!r}, [])))"
    code = f"import sys, json; sys.path.append({str(project)!r}); from base.tools import installed; {call}"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout)


def test_vendor_torch_is_kept_with_what_it_was_built_against(project, vendor):
    distribution(vendor, "torch", "2.12.0+corex.4.5", "sympy>=1.13", "triton==3.5.1", 'never; sys_platform == "win32"')
    distribution(vendor, "sympy", "1.13.3")
    state = inspect(project, vendor)
    assert state["kept"] == {"torch": "2.12.0+corex.4.5"} and state["refused"] == {}
    assert "torch==2.12.0+corex.4.5" in state["constraints"] and "sympy==1.13.3" in state["constraints"]
    names = [pin.split("==")[0] for pin in state["constraints"]]
    assert "triton" not in names and "torchvision" not in names and "numpy" in names  # the solver picks what fits that torch
    assert "triton is not installed, torch needs triton==3.5.1" in state["faults"]
    distribution(vendor, "torchvision", "0.27.0+corex.4.5", "torch==2.12.0", "numpy")
    distribution(vendor, "numpy", "1.26.4")
    state = inspect(project, vendor)
    assert state["kept"] == {"torch": "2.12.0+corex.4.5", "torchvision": "0.27.0+corex.4.5"}
    assert "numpy==1.26.4" in state["constraints"]


def test_vendor_torch_that_is_too_old_is_not_replaced(project, vendor):
    for folder in next(vendor.parents[1].glob("lib/*/site-packages")).glob("torch*.dist-info"):
        shutil.rmtree(folder)
    distribution(vendor, "torch", "2.4.1+corex.4.2")
    done = prepare(project, "--python", vendor)
    assert done.returncode == 2 and "torch 2.4.1+corex.4.2, needed is >=2.7" in done.stderr and "is not replaced" in done.stderr


def wheel(folder: Path, name: str, version: str, *needs: str, tag: str = "py3-none-any") -> Path:
    """A wheel with one module and nothing in it."""
    folder.mkdir(parents=True, exist_ok=True)
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
    metadata = "".join(f"{line}\n" for line in lines)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_a_vendors_wheels_take_the_place_of_the_pinned_versions(project, tmp_path):
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python, packages = place / "bin" / "python", tmp_path / "acme" / "packages"
    distribution(python, "torch", "2.15.0")
    wheel(packages, "torch", "2.7.1+acme.1", "sympy>=1.13.3", "triton==3.1.0; platform_system == 'Linux'")
    wheel(packages, "torch", "2.7.1+acme.2", "sympy>=1.13.3", "triton==3.1.0; platform_system == 'Linux'")
    wheel(packages, "torch", "2.9.0+acme.9", tag="cp27-cp27m-win32")
    state = inspect(project, python, tmp_path / "acme")
    assert state["kept"] == state["refused"] == {} and state["unfit"] == []
    assert "torch==2.7.1+acme.2" in state["constraints"] and "triton" not in [pin.split("==")[0] for pin in state["constraints"]]
    assert "torch 2.15.0 is installed, acme/packages has torch==2.7.1+acme.2" in state["faults"]
    for path in packages.glob("*py3-none-any.whl"):
        path.unlink()
    assert inspect(project, python, tmp_path / "acme")["unfit"] == [str(packages / "torch-2.9.0+acme.9-cp27-cp27m-win32.whl")]


def test_prepare_installs_a_vendors_wheels(project, strangers, tmp_path):
    strangers("acme", requirements="shiny>=1.0\n")
    wheel(strangers.path / "acme" / "packages", "shiny", "1.5+acme")
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    (next(place.glob("lib/*/site-packages")) / "more.pth").write_text(SITE + "\n")
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    done = prepare(project, "--name", "acme", "--python", python, strangers=strangers.path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run([python, "-m", "pip", "show", "shiny"], capture_output=True, text=True).stdout.splitlines()[1] == "Version: 1.5+acme"
    assert "everything is in place" in prepare(project, "--name", "acme", "--python", python, strangers=strangers.path).stdout
    (strangers.path / "acme" / "packages" / "shiny-1.5+acme-py3-none-any.whl").unlink()
    wheel(strangers.path / "acme" / "packages", "shiny", "1.6+acme", tag="cp27-cp27m-win32")
    checked = prepare(project, "--name", "acme", "--python", python, "--check", strangers=strangers.path)
    assert checked.returncode == 1 and "shiny-1.6+acme-cp27-cp27m-win32.whl is not for this Python" in checked.stdout


def test_half_made_venv_is_rebuilt(project):
    (project / ".venv" / "bin").mkdir(parents=True)
    done = prepare(project)
    assert done.returncode == 2 and "making" in done.stdout  # and then pip finds no index, or the disk no room
    assert subprocess.run([project / ".venv" / "bin" / "python", "-m", "pip", "--version"], capture_output=True).returncode == 0
    subprocess.run([project / ".venv" / "bin" / "python", "-m", "pip", "uninstall", "-q", "-y", "pip"], check=True, env=environ())
    distribution(project / ".venv" / "bin" / "python", "treasure", "1.0")
    done = prepare(project)
    assert done.returncode == 2 and "ensurepip" in done.stderr and list((project / ".venv").glob("lib/*/site-packages/treasure*"))
    shutil.rmtree(project / ".venv")


def test_old_python_gets_a_sentence(project):
    old = shutil.which("python3.10")
    if not old or subprocess.run([old, "-c", ""], capture_output=True).returncode:
        pytest.skip("no Python 3.10 here")
    done = prepare(project, exe=old)
    assert done.returncode == 2 and "this is Python 3.10" in done.stderr
    done = prepare(project, "--check", "--python", sys.executable, exe=old)
    assert done.returncode == 1 and "ssd-zoo is not installed" in done.stdout
