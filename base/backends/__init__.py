"""Backends are imported as ``base.backends.<name>``, never by their bare name.

The package's path is the list of directories that hold backends: the project's root, then those of ``$SSD_BACKEND_PATH``.
So a folder here that is called like an installed package never meets it (some wheels own a vendor's bare name), and what is imported this
way pickles and survives a spawned process like any module.

Nothing here imports torch: the names are known before anything is installed or loaded.
"""

from __future__ import annotations  # prepare.py runs on whatever Python there is

import difflib
import keyword
import os
from pathlib import Path

from base.errors import UserError

DEFAULT_BACKEND = "cpu"  # what runs on any machine without being named
NAMES = "letters, digits and _, a letter first, and no word of Python's own"
CONTRACTS = Path(__file__).resolve().parents[1]  # base/ has a backend.py too, which is what they all import
__path__ = [str(CONTRACTS.parent)]
__path__ += [str(Path(entry).expanduser().resolve()) for entry in os.environ.get("SSD_BACKEND_PATH", "").split(os.pathsep) if entry]


def list_backends() -> list[str]:
    """The names of all backends, sorted: folders with a ``backend.py`` in the project or in ``$SSD_BACKEND_PATH``."""
    if wrong := [place for place in __path__ if not Path(place).is_dir()]:
        raise UserError(f"$SSD_BACKEND_PATH names {wrong[0]}, which is not a folder; it takes folders that hold backend folders")
    if wrong := [Path(place) for place in __path__ if Path(place, "backend.py").is_file()]:
        raise UserError(f"$SSD_BACKEND_PATH names {wrong[0]}, which is a backend itself; it takes the folder that holds it: {wrong[0].parent}")
    found = {path.parent for place in __path__ for path in Path(place).glob("*/backend.py")}
    return sorted({folder.name for folder in found if folder != CONTRACTS})


def backend_folder(name: str) -> Path:
    """Where a backend lives. Raises UserError, with the nearest names, if there is none or more than one, or if it cannot be imported."""
    places = [Path(place) for place in dict.fromkeys(__path__)]
    found = [place / name for place in places if name in list_backends() and (place / name / "backend.py").is_file()]
    if len(found) > 1:
        raise UserError(f"two folders call themselves backend {name!r}: {' and '.join(map(str, found))}; rename one")
    if not found:
        raise UserError(f"no backend is called {name!r}{nearest(name, list_backends())}")
    if not importable(name):
        raise UserError(f"{found[0]} cannot be imported as {name!r}; rename the folder: {NAMES}")
    first = [path for place in places for path in (place / name / "__init__.py", place / f"{name}.py") if path.is_file()]
    if first and first[0].parent != found[0]:
        raise UserError(f"backend {name!r} in {found[0]} is hidden by {first[0]}, which Python imports first; rename one")
    return found[0]


def importable(name: str) -> bool:
    """Whether a backend may be called so; NAMES says what may."""
    return name.isascii() and name.isidentifier() and not name.startswith("_") and not keyword.iskeyword(name)


def nearest(name: str, names: list[str]) -> str:
    """The end of an error about an unknown name: what it may have meant, and what there is."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return (f"; did you mean {' or '.join(close)}?" if close else ";") + f" there are: {', '.join(names) or 'none'}"
