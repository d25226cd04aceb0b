"""Runs that have ended: whether they did, which of a folder belong together, and the page that is written then."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

LOOKED_AT = 200  # validation images of a run's own report, which bounds the time that it takes
LONGEST = 600  # seconds
MEMBER = re.compile(r"(stage|trial)-(\d+)")  # folder of a run that belongs to others: what a training in stages, or --trials, makes


def tool(name: str, *arguments: str) -> int:
    """A command of ``python -m base``, which knows in which room it lies."""
    from base.__main__ import main

    return main([name, *arguments])


def ended(run: Path) -> dict[str, Any] | None:
    """The last line of a run's metrics, if it came to its end."""
    try:
        last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").rstrip().rpartition("\n")[2])
    except (OSError, ValueError):  # there is none, or its last line was cut off
        return None
    return last if isinstance(last, dict) and last.get("kind") == "end" else None


def members_of(folder: Path, kind: str = "*") -> list[Path]:
    """The runs of a folder that holds several, in their order, or those of a ``kind``, stage or trial; none of a run's own folder."""
    found = [(int(name[2]), path) for path in folder.glob(f"{kind}-*") if (name := MEMBER.fullmatch(path.name)) and (path / "config.yaml").is_file()]
    return [path for _, path in sorted(found)]


def write_report(folder: Path, device: str = "auto") -> None:
    """Writes ``folder/report.html`` in a process of its own. Whatever goes wrong with it is said in a line: the run is done.

    Raises SignalException if it is to stop.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    flags = ["--images", str(LOOKED_AT), "--device", device]
    try:
        done = subprocess.run([sys.executable, "-m", "base", "report", str(folder), *flags], capture_output=True, text=True, timeout=LONGEST)
        why = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    except OSError as error:
        why = str(error)
    except subprocess.TimeoutExpired:
        why = f"it took longer than {LONGEST} seconds"
    except SignalException:
        print(f"no report (stopped); python -m base report {folder} writes it", flush=True)
        raise
    if why:
        print(f"no report ({why.removeprefix('error: ')}); python -m base report {folder} writes it", flush=True)
    else:
        print(f"    report  {folder / 'report.html'}", flush=True)
