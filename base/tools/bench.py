"""``python -m base bench --part P``: measure one part of the benchmark on this machine against its limits.

Exit code 0 when every bound is kept, 1 when one is missed. A part is a module with ``PART`` (what it times and where the
clock starts and stops) and ``measure(log, names of backends) -> list[Figure]``, or a function of `base.tools.bench_parts`.
"""

import argparse
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from base.backends import DEFAULT_BACKEND

COMPONENTS = ("loader", "matcher", "loss", "decoder", "evaluator", "step")  # functions of base.tools.bench_parts
MODULES = {"index": "bench_index", "predict": "bench_predict", "large_image": "bench_large"}  # parts with a module of their own
PARTS = (*MODULES, *COMPONENTS)


@dataclass(frozen=True)
class Figure:
    """One figure; ``spread`` is (lowest, highest) of the runs, ``most`` and ``least`` bound the value (None: no bound).

    Without a ``value`` it was not measured, and ``note`` says why.
    """

    name: str
    value: float | None
    unit: str
    most: float | None = None
    runs: int = 1
    spread: tuple[float, float] | None = None
    least: float | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        """False if the value is out of its bounds; one that was not measured is not."""
        too_much = self.most is not None and self.value is not None and self.value > self.most
        too_little = self.least is not None and self.value is not None and self.value < self.least
        return not (too_much or too_little)


def machine() -> dict[str, str]:
    """What a figure depends on: processor, cores this process may use, memory, software and commit."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    root = Path(__file__).resolve().parents[2]
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(ask, cwd=root, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": commit or "none",
    }


def table(figures: list[Figure]) -> str:
    rows = [("figure", "value", "lowest … highest", "bound", "")]
    for figure in figures:
        spread = f"{figure.spread[0]:.3g} … {figure.spread[1]:.3g} of {figure.runs}" if figure.spread else ""
        bounds = [f"{sign} {value:.3g}" for sign, value in (("≤", figure.most), ("≥", figure.least)) if value is not None]
        mark = "" if not bounds or figure.value is None else "ok" if figure.ok else "MISS"
        value = f"not measured ({figure.note})" if figure.value is None else f"{figure.value:.3g} {figure.unit}"
        rows.append((figure.name, value, spread, " ".join(bounds), mark))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def chosen(part: str, names: list[str] | None) -> tuple[str, Callable]:
    """What a part times, and the function that measures it; only its module is imported."""
    if part in MODULES:
        module = importlib.import_module(f"base.tools.{MODULES[part]}")
        return module.PART, lambda log: module.measure(log, names or [DEFAULT_BACKEND])
    from base.backend import list_backends, load_backend

    function = getattr(importlib.import_module("base.tools.bench_parts"), part)
    names = names or [name for name in list_backends() if load_backend(name).device in ("auto", "cpu")]
    return " ".join(function.__doc__.split()), lambda log: function(log, names)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m base bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, required=True, help="what to measure")
    who = "backends to compare (default: components of all that run on the CPU, else the default backend)"
    parser.add_argument("--name", nargs="+", metavar="BACKEND", default=None, help=who)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args(arguments)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in training (base.tools.launch); torch is not loaded yet
    boundaries, measure = chosen(options.part, options.name)
    print(boundaries, flush=True)
    figures = measure(lambda line: print(f"  {line}", file=sys.stderr, flush=True))
    about = machine()
    print("\n" + "\n".join(f"{name:7} {value}" for name, value in about.items()) + "\n\n" + table(figures))
    if options.json:
        content = {"part": options.part, "boundaries": boundaries, "machine": about, "figures": [{**asdict(f), "ok": f.ok} for f in figures]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if all(figure.ok for figure in figures) else 1
