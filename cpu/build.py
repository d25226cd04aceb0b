"""Builds the native parts of the CPU backend: ``native/<name>.cpp`` becomes the module ``_<name>`` beside this file.

``python cpu/build.py`` builds if not all is current; ``--check`` only looks: exit code 0 if all is current, 1 if not, 2 if it cannot be
built here; ``--sanitize`` builds with AddressSanitizer and UndefinedBehaviorSanitizer into ``native/sanitized/``, for `tests/test_fuzz.py`.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).resolve().parent
SANITIZED = HERE / "native" / "sanitized"
STAMP = "_built.json"  # beside the modules
FLAGS = ["-std=c++17", "-O3", "-fno-trapping-math", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread"]
SANITIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
SANITIZE += ["-fno-sanitize=null,vptr,object-size"]  # which take most of the compiler's time, and see nothing here that the others miss
LIBRARIES = {"images": ["-ljpeg"], "norm": ["-fopenmp"]}  # module → what it is linked with; libgomp is there once torch is loaded
INSTALL = "apt-get install -y g++ libjpeg62-turbo-dev (Debian; Ubuntu: g++ libjpeg-turbo8-dev; Fedora: gcc-c++ libjpeg-turbo-devel)"


def sources() -> dict[str, Path]:
    """Module name → its source."""
    return {path.stem: path for path in sorted((HERE / "native").glob("*.cpp"))}


def fingerprint(flags: Sequence[str]) -> str:
    """What decides the result: sources, headers, flags, this Python."""
    digest = hashlib.sha256(repr((FLAGS, list(flags), LIBRARIES, sys.version)).encode())
    for path in sorted((HERE / "native").glob("*.[ch]pp")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def target(name: str, folder: Path) -> Path:
    return folder / f"_{name}{EXTENSION_SUFFIXES[0]}"


def current(folder: Path = HERE, flags: Sequence[str] = ()) -> bool:
    """Whether everything is built from these sources."""
    stamp = folder / STAMP
    return stamp.exists() and json.loads(stamp.read_text()) == fingerprint(flags) and all(target(name, folder).exists() for name in sources())


def missing() -> str:
    """What the machine lacks for building, with the command that installs it; nothing if it lacks nothing."""
    if shutil.which("g++") is None:
        return f"the CPU backend is native code and there is no C++ compiler here: {INSTALL}; or use --name reference"
    probe = subprocess.run(["g++", "-E", "-x", "c++", "-"], input="#include <cstdio>\n#include <jpeglib.h>\n", capture_output=True, text=True)
    if probe.returncode:
        return f"the CPU backend reads JPEG files with libjpeg-turbo, whose header jpeglib.h is missing: {INSTALL}; or use --name reference"
    return ""


def compile_one(name: str, folder: Path, flags: list[str]) -> str:
    """Builds one module; returns the compiler's words if it failed."""
    import pybind11

    output = target(name, folder)
    includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    temporary = output.with_suffix(".new")
    command = ["g++", *FLAGS, *flags, *includes, str(sources()[name]), "-o", str(temporary), *LIBRARIES.get(name, [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{' '.join(command)}\n{done.stderr}"
    temporary.replace(output)
    return ""


def main(arguments: list[str]) -> int:
    folder, flags = (SANITIZED, SANITIZE) if arguments == ["--sanitize"] else (HERE, [])
    if current(folder, flags):
        if arguments != ["--check"]:
            print(f"{', '.join(sources())}: current")
        return 0
    if problem := missing():
        print(problem, file=sys.stderr)
        return 2
    if arguments == ["--check"]:
        return 1
    if importlib.util.find_spec("pybind11") is None:
        print(f"{sys.executable} lacks the package pybind11, which building needs: python3 prepare.py installs it", file=sys.stderr)
        return 2
    folder.mkdir(exist_ok=True)
    with ThreadPoolExecutor() as pool:
        problems = [problem for problem in pool.map(lambda name: compile_one(name, folder, flags), sources()) if problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        (folder / STAMP).write_text(json.dumps(fingerprint(flags)))
        print(f"built {', '.join(sources())}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
