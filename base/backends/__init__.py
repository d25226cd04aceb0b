"""Backends are imported as ``base.backends.<name>``, never by their bare name.

The package's path is the list of directories that hold backends: the project's root, then those of ``$SSD_BACKEND_PATH``.
So a folder here that is called like an installed package never meets it (some wheels own a vendor's bare name), and what is imported this
way pickles and survives a spawned process like any module.

Nothing here imports torch: the names are known before anything is installed or loaded.
"""

from __future__ import annotations  # prepare.py runs on whatever Python there is

import difflib
import os
from pathlib import Path

from base.errors import UserError

DEFAULT_BACKEND = "cpu"  # what runs on any machine without being named
CONTRACTS = Path(__file__).resolve().parents[1]  # base/ has a backend.py too, which is what they all import
__path__ = [str(CONTRACTS.parent)]
__path__ += [str(Path(entry).expanduser().resolve()) for entry in os.environ.get("SSD_BACKEND_PATH", "").split(os.pathsep) if entry]


def list_backends() -> list[str]:
    """The names of all backends, sorted: folders with a ``backend.py`` in the project or in ``$SSD_BACKEND_PATH``."""
    if wrong := [place for place in __path__ if not Path(place).is_dir()]:
        raise UserError(f"$SSD_BACKEND_PATH names {wrong[0]}, which is not a folder; it takes folders that hold backend folders")
    found = {path.parent for place in __path__ for path in Path(place).glob("*/backend.py")}
    return sorted({folder.name for folder in found if folder != CONTRACTS})


def backend_folder(name: str) -> Path:
    """Where a backend lives. Raises UserError, with the nearest names, if there is none or more than one."""
    found = [Path(place, name) for place in dict.fromkeys(__path__) if name in list_backends() and Path(place, name, "backend.py").is_file()]
    if len(found) > 1:
        raise UserError(f"two folders call themselves backend {name!r}: {' and '.join(map(str, found))}; rename one")
    if not found:
        raise UserError(f"no backend is called {name!r}{nearest(name, list_backends())}")
    return found[0]


def nearest(name: str, names: list[str]) -> str:
    """The end of an error about an unknown name: what it may have meant, and what there is."""
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.5)
    return (f"; did you mean {' or '.join(close)}?" if close else ";") + f" there are: {', '.join(names) or 'none'}"
