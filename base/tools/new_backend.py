"""``python -m base new-backend NAME``: writes a backend's folder that trains the demo and passes ``verify`` as it stands.

What it writes is `scaffold/acme`, a backend like any other, under the new name. `docs/adding-a-backend.md` goes on from there.
"""

import argparse
import importlib.util
import re
import shlex
from pathlib import Path

from base.backends import NAMES, importable
from base.backends import __path__ as places
from base.errors import UserError

SCAFFOLD = Path(__file__).parent / "scaffold" / "acme"
ROOT = Path(__file__).resolve().parents[2]
GENERATED = ("build", "data", "runs")
# For a folder outside the project, at the end of its environment_variables.sh
FOUND = """
# Where this folder is found
export SSD_BACKEND_PATH=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)${SSD_BACKEND_PATH:+:$SSD_BACKEND_PATH}
"""


def check_name(name: str, place: Path) -> None:
    """Raises UserError if a backend cannot be called so, or if something else has its name already."""
    if not importable(name):
        raise UserError(f"a backend cannot be called {name!r}; choose another name: {NAMES}")
    for other in dict.fromkeys([str(place), *places]):
        for path in (Path(other, name), Path(other, f"{name}.py")):
            if path.exists():
                raise UserError(f"the name {name!r} is taken by {path}; choose another")
    if place != ROOT:
        return
    if name in GENERATED:
        raise UserError(f"the name {name!r} is that of a folder which the project makes and git ignores; choose another")
    spec = importlib.util.find_spec(name)
    if spec and spec.origin is None:  # a package without __init__.py, which a folder at the project's root would become a part of
        where = ", ".join(spec.submodule_search_locations or ())
        raise UserError(f"the name {name!r} is that of an installed package in {where}; choose another, or --dir DIR outside the project")


def write(name: str, device: str, place: Path) -> list[Path]:
    """Writes the folder and returns its files."""
    words = {"acme": name, "ACME": name.upper().replace("_", ""), "Acme": name.title().replace("_", "")}

    def named(text: str) -> str:
        return re.sub("|".join(words), lambda word: words[word[0]], text)

    files = []
    for source in sorted(path for path in SCAFFOLD.rglob("*") if path.suffix in (".py", ".txt", ".yaml", ".sh", ".md")):
        text = named(source.read_text(encoding="utf-8")).replace('device="auto"', f'device="{device}"')
        if place != ROOT:
            text = text.replace(f"source {name}/", f"source path/to/{name}/") + FOUND * (source.suffix == ".sh")
        target = place / name / named(str(source.relative_to(SCAFFOLD)))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        files.append(target)
    return files


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base new-backend", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help=f"the backend's name and its folder's: {NAMES}")
    parser.add_argument("--dir", type=Path, default=ROOT, help="where the folder is made (default: in the project)")
    parser.add_argument("--device", default="auto", metavar="TYPE", help="its torch device type (default: the machine's accelerator, else the CPU)")
    options = parser.parse_args(arguments)
    place = options.dir.expanduser().resolve()
    check_name(options.name, place)
    if not re.fullmatch("[a-z]+", options.device):
        raise UserError(f"--device {options.device!r} is not a torch device type: lower-case letters without a number, such as cpu or xpu")
    try:
        files = write(options.name, options.device, place)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror}; choose another --dir") from error
    shown = [shlex.quote(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)) for path in files]
    script = next(path for path in shown if "environment_variables" in path)
    print("\n".join(shown))
    print(f"\nnext, in {ROOT}:\n  source {script}\n  bash run_training.sh --name {options.name}\n  python -m base verify --name {options.name}")
    return 0
