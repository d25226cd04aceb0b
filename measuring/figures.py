"""A figure with its spread and its ratios, the table of them, and the machine that they are of."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

Log = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """One figure; ``spread`` is (lowest, highest) of the runs, ``most`` and ``least`` bound the value (None: no bound).

    ``reference`` and ``ceiling`` are the value as a multiple of the backend ``reference``'s and of what the machine allows, None
    where there is none. Without a ``value`` it was not measured, and ``note`` says why.
    """

    name: str
    value: float | None
    unit: str
    most: float | None = None
    runs: int = 1
    spread: tuple[float, float] | None = None
    least: float | None = None
    note: str = ""
    reference: float | None = None
    ceiling: float | None = None

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
    root = Path(__file__).resolve().parents[1]
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(ask, cwd=root, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    return {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.0f} GB",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": f"{version('torch')}, {os.environ.get('OMP_NUM_THREADS') or len(os.sched_getaffinity(0))} threads",
        "commit": commit or "none",
    }


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as columns; what is empty in all of them is left out."""
    columns = [cells for cells in zip(*rows, strict=True) if any(cells[1:])]
    widths = [max(map(len, cells)) for cells in columns]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in zip(*columns, strict=True))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(figures: Sequence[Figure]) -> str:
    rows = [("figure", "median", "lowest … highest", "/ reference", "/ ceiling", "bound", "")]
    for figure in figures:
        spread = f"{number(figure.spread[0])} … {number(figure.spread[1])} of {figure.runs}" if figure.spread else ""
        ratios = [f"{number(ratio)} ×" if ratio is not None else "" for ratio in (figure.reference, figure.ceiling)]
        bounds = [f"{sign} {number(value)}" for sign, value in (("≤", figure.most), ("≥", figure.least)) if value is not None]
        mark = "" if not bounds or figure.value is None else "ok" if figure.ok else "MISS"
        value = f"not measured ({figure.note})" if figure.value is None else f"{number(figure.value)} {figure.unit}"
        rows.append((figure.name, value, spread, *ratios, " ".join(bounds), mark))
    return aligned(rows)
