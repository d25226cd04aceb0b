#!/usr/bin/env python3
"""Bring one backend into working order: environment, packages, extensions, imports and, on request, the data.

Standard library only: it runs before anything is installed. A second run finds nothing to do and says so;
`--check` only looks. Exit codes: 0 in place, 1 `--check` found faults, 2 an error with its fix, 130 interrupted.
"""

from __future__ import annotations  # an old Python then gets as far as the sentence that it is too old

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.backends import DEFAULT_BACKEND, backend_folder
from base.errors import UserError
from data_sets import layout
from data_sets.download import fetch_dataset, locked
from data_sets.transfer import GB, Transfer

ROOT = Path(__file__).resolve().parent
INSTALL_BYTES = 9e9  # torch with NVIDIA's libraries: 3 GB of wheels in pip's cache, 5.7 GB installed
ABOUT_SELF = "import sys, importlib.util as u; print(sys.prefix); print(sys.version.split()[0]); print(u.find_spec('pip') is not None)"


@dataclass(frozen=True)
class Environment:
    python: Path
    prefix: Path
    version: str
    pip: bool
    own: bool  # the project's .venv: ours to make and mend

    @property
    def label(self) -> str:
        return f"{'.venv' if self.own else self.prefix} (Python {self.version})"


def examine(python: Path, own: bool) -> Environment | None:
    """What the interpreter says of itself; None when it does not run."""
    try:
        answer = subprocess.run([python, "-c", ABOUT_SELF], capture_output=True, text=True, timeout=60, cwd="/")
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    return None if answer.returncode or len(lines) != 3 else Environment(python, Path(lines[0]), lines[1], lines[2] == "True", own)


def minimum_python() -> tuple[int, ...]:
    (bound,) = re.findall(r'^requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return tuple(map(int, bound.split(".")))


def choose_environment(wanted: str | None) -> Environment | None:
    """`--python`, else the active environment, else the project's .venv; None when that is missing or half-made."""
    active = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    if wanted or active:
        python = shutil.which(wanted or f"{active}/bin/python")
        found = examine(Path(python).absolute(), False) if python else None
        if not found:
            source = f"--python {wanted}" if wanted else f"the active environment {active}"
            raise UserError(f"{source}: no working Python there: name another one with --python, or deactivate it")
    else:
        found = examine(ROOT / ".venv" / "bin" / "python", True)
    if found and tuple(map(int, found.version.split(".")[:2])) < minimum_python():
        raise UserError(f"{found.label} is too old, Python >= {'.'.join(map(str, minimum_python()))} is needed: --python names another")
    if found and not found.pip:
        if found.own and not list(found.prefix.glob("lib/*/site-packages/*.dist-info")):
            return None  # half-made; one with packages is somebody's work and not ours to delete
        raise UserError(f"{found.label} has no pip: {shlex.quote(str(found.python))} -m ensurepip")
    return found


def make_environment() -> Environment:
    """A fresh .venv in the project, in place of a half-made one."""
    place, need = ROOT / ".venv", minimum_python()
    if sys.version_info[:2] < need:
        newer = next(filter(shutil.which, (f"python3.{minor}" for minor in range(14, need[1] - 1, -1))), "install one, then python3.11")
        raise UserError(f"this is Python {sys.version.split()[0]}, 3.{need[1]} or later is needed: {newer} prepare.py …")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", place], capture_output=True, text=True)
    found = examine(place / "bin" / "python", True)
    if made.returncode or not found or not found.pip:
        output = (made.stdout + made.stderr).strip()
        fix = f"apt install python3-venv (or python3.{sys.version_info.minor}-venv)" if "ensurepip" in output else "mend that"
        raise UserError(f"{sys.executable} -m venv {place} failed: {output[-600:]}\n{fix}, then run this again")
    return found


def ask(environment: Environment, function: str, *arguments: object) -> Any:
    """Call a function of base.tools.installed in the environment's Python."""
    call = f"print(json.dumps(installed.{function}(*{arguments!r})))"
    code = f"import sys, json; sys.path.append({str(ROOT)!r}); from base.tools import installed; {call}"
    answer = subprocess.run([environment.python, "-c", code], capture_output=True, text=True, cwd="/")
    if answer.returncode:
        raise UserError(f"{environment.label}: {function} ended with {answer.returncode}: {answer.stderr.strip()[-1500:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def stream(command: list[str | Path], hide: str = "") -> tuple[int, list[str]]:
    """Run a command with its output indented as it comes; returns its exit code and last lines. Lines with `hide` are left out."""
    last: deque[str] = deque(maxlen=15)
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        for line in process.stdout or ():
            if not hide or hide not in line:
                last.append(line.rstrip())
                print(f"  {line.rstrip()}", flush=True)
    return process.returncode, list(last)


def install(environment: Environment, backend: Path, extras: list[str], state: dict[str, Any]) -> None:
    """One pip call for the project and the backend's requirements."""
    if state["unfit"]:
        raise UserError(f"{', '.join(state['unfit'])}: not for {environment.label} on this machine; --python EXE takes the Python that they are for")
    if state["refused"] and not (environment.own and "+" not in str(state["refused"])):  # +: a vendor's, also in an environment of ours
        found = "; ".join(f"{name} {text}" for name, text in state["refused"].items())
        raise UserError(f"{environment.label} has {found}: it may be a vendor's build and is not replaced; use another environment "
                        f"(--python EXE), or remove it: {environment.python} -m pip uninstall {' '.join(state['refused'])}")  # fmt: skip
    print(f"[2/4] packages: {len(state['faults'])} to mend ({state['faults'][0]}{'; …' * (len(state['faults']) > 1)})", flush=True)
    if "torch" in state["missing"]:
        if full := room_faults(environment.prefix, INSTALL_BYTES):
            raise UserError(f"{full[0]}: make room there")
        print("  torch and its libraries are a download of 3 GB, 6 GB installed: about two minutes on a fast line", flush=True)
    for name, version in state["kept"].items():
        print(f"  keeping the {name} {version} of this environment instead of the pinned version", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        constraints = Path(scratch) / "constraints.txt"
        constraints.write_text("\n".join(state["constraints"]) + "\n")
        target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
        command = [environment.python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-c", constraints, "-e", target]
        if (backend / "packages").exists():  # a vendor's own builds, which no index has
            command += ["--find-links", backend / "packages"]
        if (backend / "requirements.txt").exists():
            command += ["-r", backend / "requirements.txt"]
        if sys.stdout.isatty():  # pip draws its progress bars only on a terminal of its own
            code = subprocess.run(command, cwd=ROOT).returncode
        else:
            code, _ = stream(command, hide="Requirement already satisfied")
    if code:
        raise UserError(f"pip could not install the packages (exit code {code}, its reasons are above): mend that and run this again")


def built(environment: Environment, backend: Path) -> bool:
    """Whether the extensions are current. Raises UserError if the build says, by exit code 2, that this machine lacks something."""
    if not (backend / "build.py").exists():
        return True
    done = subprocess.run([environment.python, backend / "build.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 2 and done.stderr:
        raise UserError(done.stderr.strip())
    return done.returncode == 0


def room_faults(place: Path, needed: float) -> list[str]:
    free = shutil.disk_usage(place).free
    return [f"{free / GB:.1f} GB are free in {place}, about {needed / GB:.0f} GB are needed"] if free < needed else []


def layout_faults(options: argparse.Namespace) -> list[str]:
    try:
        layout.find(options.data_dir, given=layout.stated(options))
    except UserError as error:
        return [str(error)]
    return []


def check(options: argparse.Namespace, backend: Path, extras: list[str]) -> int:
    """`--check`: name every fault and its fix, change nothing."""
    again = f"python3 prepare.py --name {options.name}" + (f" --python {shlex.quote(options.python)}" if options.python else "")
    again += " --with-tests" if options.with_tests else ""
    faults: list[tuple[str, str]] = []
    environment, room = choose_environment(options.python), 1e9  # for checkpoints and logs
    if environment is None:
        faults.append((f"{ROOT}/.venv is missing or half-made", again))
        room = INSTALL_BYTES
    else:
        print(f"environment: {environment.label}")
        state = ask(environment, "inspect", str(backend), extras)
        faults += [(fault, again) for fault in state["faults"]]
        faults += [(f"{wheel} is not for this Python", "--python EXE takes the one that it is for") for wheel in state["unfit"]]
        faults += [(fault, again) for fault in ask(environment, "check_imports", options.name, state["missing"])]
        try:
            if not built(environment, backend):
                faults.append((f"the extensions of {options.name} are not built, or not from these sources", again))
        except UserError as error:
            faults.append((str(error), again))
        room = INSTALL_BYTES if "torch" in state["missing"] else room
    if options.data_dir:
        get = f"python3 prepare.py --name {options.name} --data_dir {shlex.quote(str(options.data_dir))}"
        faults += [(fault, f"{get} --download (COCO 2017) or {get} --demo-data") for fault in layout_faults(options)]
    faults += [(fault, "make room there") for fault in room_faults(environment.prefix if environment else ROOT, room)]
    for fault, fix in faults:
        print(f"fault: {fault}\n  fix: {fix}")
    print(f"{len(faults)} fault{'s' if len(faults) > 1 else ''}" if faults else "everything is in place")
    return 1 if faults else 0


def compare(options: argparse.Namespace, environment: Environment, backend: Path, extras: list[str]) -> tuple[bool, dict[str, Any], Path]:
    """Whether the last run's stamp still describes the environment; the state of it; the stamp's path."""
    extensions = built(environment, backend)  # first: what cannot be built here is told before anything is installed
    state = ask(environment, "inspect", str(backend), extras)
    stamp = environment.prefix / ".ssd-zoo" / f"{'+'.join([options.name, *extras])}.json"
    same = stamp.exists() and json.loads(stamp.read_text()) == [state["inputs"], state["packages"]]
    return same and not state["faults"] and extensions, state, stamp


def step(number: int, text: str, started: float) -> float:
    print(f"[{number}/4] {text} ({time.monotonic() - started:.1f} s)", flush=True)
    return time.monotonic()


def prepare_environment(options: argparse.Namespace, backend: Path, extras: list[str]) -> Environment:
    """Environment, packages, extensions and imports, each only as far as it is not in place."""
    lock, started = ROOT / "build" / "prepare.lock", time.monotonic()
    environment = choose_environment(options.python)
    if environment:
        current, state, _ = compare(options, environment, backend, extras)
        if current:
            seconds = time.monotonic() - started
            print(f"{options.name}: everything is in place in {environment.label}, {len(state['packages'])} packages ({seconds:.1f} s)")
            return environment
        lock = lock if environment.own else environment.prefix / ".ssd-zoo" / "lock"
    with locked(lock, sys.stdout):
        environment = choose_environment(options.python)  # whoever had the lock may have made it
        if environment is None:
            print(f"[1/4] environment: making {ROOT / '.venv'}", flush=True)
            environment = make_environment()
        started = step(1, f"environment: {environment.label}", started)
        _, state, stamp = compare(options, environment, backend, extras)
        if state["faults"]:
            install(environment, backend, extras, state)
            state = ask(environment, "inspect", str(backend), extras)
            if state["faults"]:
                raise UserError("\n  ".join([f"after pip's run {environment.label} still lacks:", *state["faults"]]))
        started = step(2, f"packages: {len(state['packages'])} in place", started)
        if not built(environment, backend):
            print(f"[3/4] extensions: building those of {options.name}", flush=True)
            code, last = stream([environment.python, backend / "build.py"])
            if code or not built(environment, backend):
                how = f"ended with exit code {code}" if code else "succeeded, but its --check says that the extensions are not current"
                raise UserError("\n  ".join([f"{backend / 'build.py'} {how}; its last lines:", *last]))
        started = step(3, f"extensions: {'current' if (backend / 'build.py').exists() else 'none to build'}", started)
        if faults := ask(environment, "check_imports", options.name, []):
            raise UserError("\n  ".join([f"{environment.label} is not usable:", *faults]))
        step(4, "imports: all work", started)
        stamp.parent.mkdir(exist_ok=True)
        stamp.with_suffix(".new").write_text(json.dumps([state["inputs"], state["packages"]]))
        os.replace(stamp.with_suffix(".new"), stamp)
    return environment


def prepare_data(options: argparse.Namespace, environment: Environment) -> None:
    if options.download:
        fetch_dataset(options.data_dir, Transfer(), base_url=options.base_url, keep_zips=options.keep_zips)
    paths = [text for key, path in layout.stated(options).items() for text in (f"--{key}", path)]
    for tool, more in [("demo-data", [])] * options.demo_data + [("index", paths)]:
        code = subprocess.run([environment.python, "-m", "base", tool, "--data_dir", options.data_dir, *more], cwd=ROOT).returncode
        if code:
            raise UserError(f"python -m base {tool} --data_dir {options.data_dir} ended with exit code {code}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--name", default=DEFAULT_BACKEND, metavar="BACKEND", help="the backend to prepare (default: %(default)s)")
    parser.add_argument("--data_dir", "--data-dir", type=Path, metavar="DIR", help="data set, in a layout of COCO or Pascal VOC")
    layout.flags(parser, *layout.PARTS)
    parser.add_argument("--python", metavar="EXE", help="install there instead of the active environment or .venv")
    parser.add_argument("--check", action="store_true", help="only look: name every fault and its fix")
    parser.add_argument("--with-tests", action="store_true", help="install what the tests need, too")
    parser.add_argument("--demo-data", action="store_true", help="draw the small demo data set (default DIR: data/demo)")
    parser.add_argument("--download", action="store_true", help="fetch COCO 2017 and the backbone's weights into DIR")
    parser.add_argument("--base-url", metavar="URL", help="with --download: a mirror that serves the same four files as URL/NAME")
    parser.add_argument("--keep-zips", action="store_true", help="with --download: keep the archives once they are unpacked")
    options = parser.parse_args(arguments)
    if options.download and not options.data_dir:
        parser.error("--download needs --data_dir DIR, the folder to fill")
    if options.check + options.download + options.demo_data > 1:
        parser.error("--check, --download and --demo-data exclude each other")
    if options.data_dir or options.demo_data:
        options.data_dir = (options.data_dir or ROOT / "data" / "demo").absolute()
    try:
        backend, extras = backend_folder(options.name), ["export", "test"] * options.with_tests
        if options.check:
            return check(options, backend, extras)
        if options.data_dir and not (options.download or options.demo_data) and (faults := layout_faults(options)):
            get = f"python3 prepare.py --name {options.name} --data_dir {shlex.quote(str(options.data_dir))}"
            raise UserError(f"{'; '.join(faults)}: {get} --download fetches COCO 2017, {get} --demo-data draws a small data set")
        environment = prepare_environment(options, backend, extras)
        if options.data_dir:
            prepare_data(options, environment)
    except (UserError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing half-made is taken for whole; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
