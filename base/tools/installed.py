"""What an environment holds against what the project needs; prepare.py calls this in the environment's own Python."""

import hashlib
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from base.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = {  # what the benchmark imports, and the distribution that holds it
    "torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL.Image": "pillow", "pycocotools.mask": "pycocotools",
    "pydantic": "pydantic", "yaml": "pyyaml", "rich": "rich", "mlperf_logging.mllog": "mlperf-logging",
}  # fmt: skip


def parse_requirements(path: Path) -> list[str]:
    """The requirement lines of a requirements or constraints file; `-r FILE` is followed, other options are pip's alone."""
    lines: list[str] = []
    for raw in path.read_text().splitlines() if path.exists() else ():
        line = re.sub(r"(^|\s)#.*", "", raw).strip()
        if included := re.match(r"(?:-r|--requirement)[ =]\s*(.+)", line):
            lines += parse_requirements(path.parent / included[1])
        lines += [line] if line and not line.startswith("-") else []
    return lines


def read_wheels(folder: Path) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """A vendor's own builds, which no index has: package → (version, packages that it needs), and the files that do not fit this Python.

    Of several versions of a package the latest that fits counts. Runs in the environment's own Python.
    """
    import zipfile
    from email.parser import BytesParser

    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.tags import sys_tags
    from pip._vendor.packaging.utils import parse_wheel_filename

    fitting, found, unfit = set(sys_tags()), {}, {}
    named = [(*parse_wheel_filename(path.name), path) for path in folder.glob("*.whl")]
    for name, version, _, tags, path in sorted(named, key=lambda each: each[:2]):
        if fitting.isdisjoint(tags):
            unfit[name] = str(path)
            continue
        with zipfile.ZipFile(path) as wheel:
            (member,) = [each for each in wheel.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", each)]
            needs = BytesParser().parsebytes(wheel.read(member)).get_all("Requires-Dist", [])
        found[name] = str(version), [Requirement(line).name for line in needs]
    return found, [path for name, path in unfit.items() if name not in found]


def inspect(backend: str, extras: list[str]) -> dict[str, Any]:
    """Compare what is installed with what is required; runs in the environment's own Python and imports no package of it.

    `faults` is one line per requirement that is missing or in a wrong version, `packages` everything the requirements
    reach, `constraints` the pins with those of a torch that is kept replaced, `inputs` what decided all this, `unfit` the
    wheels in the backend's `packages/` that are for another Python. The others there take the place of the pinned versions.
    """
    import tomllib
    from importlib.metadata import distributions

    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name as canonical

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
    lines += parse_requirements(Path(backend) / "requirements.txt")
    everything = [each for each in distributions() if each.metadata["Name"]]
    installed = {canonical(each.metadata["Name"]): each for each in reversed(everything)}  # the first on the path wins
    pins = {canonical(pin.name): pin for pin in map(Requirement, parse_requirements(ROOT / "constraints.txt"))}
    wheels, unfit = read_wheels(Path(backend) / "packages")
    for name in [each for _, needs in wheels.values() for each in needs]:
        pins.pop(canonical(name), None)
    pins |= {name: Requirement(f"{name}=={version}") for name, (version, _) in wheels.items()}

    def reach(todo: list[tuple[Any, str]]) -> tuple[list[str], dict[str, str]]:
        """Follow requirements through what is installed: (what is wrong, version of everything reached)."""
        faults, packages, seen = set(), {}, set()
        while todo:
            needed, parent = todo.pop()
            name = canonical(needed.name)
            found, pin = installed.get(name), pins.get(name, needed)
            packages[name] = found.version if found else ""
            if found is None:
                faults.add(f"{name} is not installed, {parent} needs {needed}")
                continue
            pinned = f"{Path(backend).name}/packages has" if name in wheels else "constraints.txt allows"
            for limit, whose in ((needed, f"{parent} needs"), (pin, pinned)):
                if not limit.specifier.contains(found.version, prereleases=True):
                    faults.add(f"{name} {found.version} is installed, {whose} {limit}")
                    break
            if (name, *needed.extras) not in seen:
                seen.add((name, *needed.extras))
                todo += [(more, name) for more in map(Requirement, found.requires or ()) if applies(more, needed.extras)]
        return sorted(faults), dict(sorted(packages.items()))

    def applies(needed: Any, wanted: set[str]) -> bool:
        return not needed.marker or any(needed.marker.evaluate({"extra": extra}) for extra in wanted or {""})

    roots = [(needed, "this project") for needed in map(Requirement, lines) if applies(needed, set())]
    limits = {canonical(needed.name): needed.specifier for needed, _ in roots}
    there = {name: installed[name].version for name in ("torch", "torchvision") if name in installed}
    allowed = {name: version for name, version in there.items() if limits[name].contains(version, prereleases=True)}
    kept = {name: version for name, version in allowed.items() if name not in wheels and not pins[name].specifier.contains(version, prereleases=True)}
    if kept:  # a vendor's build: neither it nor what it was built against is replaced
        around = {"torchvision": "", "torch": "", **allowed, **reach([(Requirement(name), name) for name in kept])[1]}
        for name, version in around.items():
            pins.pop(name, None)
            if version and (name not in limits or limits[name].contains(version, prereleases=True)):
                pins[name] = Requirement(f"{name}=={version}")
    faults, packages = reach(roots)
    origins = [each.read_text("direct_url.json") for each in everything if canonical(each.metadata["Name"]) == project["name"]]
    if not any(origin and json.loads(origin)["url"] == ROOT.as_uri() for origin in origins):
        faults.append(f"{project['name']} is not installed from {ROOT}")
    files = [ROOT / "pyproject.toml", ROOT / "constraints.txt", Path(backend, "build.py")]
    texts = [path.read_text() if path.exists() else "" for path in files]
    inputs = hashlib.sha256(repr([str(ROOT), sys.version, extras, lines, texts, wheels]).encode()).hexdigest()
    refused = {name: f"{version}, needed is {limits[name]}" for name, version in there.items() if name not in allowed}
    refused = {name: text for name, text in refused.items() if name not in wheels}
    return {"faults": faults, "packages": packages, "kept": kept, "refused": refused, "inputs": inputs, "unfit": unfit,
            "constraints": sorted(map(str, pins.values())), "missing": [name for name in IMPORTS.values() if name not in installed]}


def check_imports(backend: str, skip: list[str]) -> list[str]:
    """What cannot be imported, and why; runs in the environment's own Python."""
    faults = []
    for module in [module for module, distribution in IMPORTS.items() if distribution not in skip] + [""] * (not skip):
        try:
            if module:
                loaded = import_module(module)
            elif not faults:
                import_module("base.backend").load_backend(backend)
            if module == "torchvision":  # it can be imported beside a torch that its operators were not built for
                zeros = import_module("torch").zeros
                loaded.ops.nms(zeros(1, 4), zeros(1), 0.5)
        except (ImportError, RuntimeError, OSError, LookupError, AttributeError, ValueError, TypeError, SyntaxError, UserError) as error:
            what = f"import {module}" if module else f"backend {backend}"
            faults.append(f"{what} fails: {type(error).__name__}: {str(error).strip()[:400]}")
    return faults
