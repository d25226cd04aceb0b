"""The folder of a run: configuration, environment, metrics as JSON lines, a log and the MLPerf log."""

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from base.config import Config, Resolved, parse_value
from base.errors import UserError
from base.mlperf import MLPerfLog
from base.terminal import Display

CUT_BACK = ("metrics.jsonl", "mlperf.log")  # a resumed run cuts these to where its checkpoint was written
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "pydantic", "mlperf-logging")


class Records:
    """Writes a run's folder. ``folder`` None (ranks after the first): every method does nothing."""

    def __init__(self, folder: Path | None, display: Display):
        self.folder, self.display = folder, display
        if folder is None:
            self.mlperf = MLPerfLog(None)
            return
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
            self.log_file = open(folder / "log.txt", "a", encoding="utf-8")
            self.mlperf = MLPerfLog(folder / "mlperf.log")
        except OSError as error:
            raise UserError(f"run folder {folder} cannot be written ({error.strerror}); choose another with --runs_dir") from error

    def metric(self, kind: str, **values) -> None:
        """One line of metrics.jsonl."""
        if self.folder:
            self.metrics.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **values}) + "\n")
            self.metrics.flush()

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        if self.folder:
            self.log_file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
            self.log_file.flush()
            self.display.line(line)

    def sizes(self) -> dict[str, int]:
        """The present length in bytes of the files that a resumed run cuts back."""
        return {name: (self.folder / name).stat().st_size for name in CUT_BACK} if self.folder else {}

    def close(self) -> None:
        self.display.close()
        if self.folder:
            self.metrics.close()
            self.log_file.close()


def cut_back(folder: Path, sizes: dict[str, int]) -> None:
    """Cuts the records to the lengths that a checkpoint states: what came after it will be done again."""
    for name in CUT_BACK:
        if (folder / name).exists():
            os.truncate(folder / name, min(sizes.get(name, 0), (folder / name).stat().st_size))


def write_start(folder: Path, resolved: Resolved, backend: str, suppliers: dict[str, str], device: torch.device) -> None:
    """config.yaml with where each value comes from, and environment.json."""
    (folder / "config.yaml").write_text(config_text(resolved, backend), encoding="utf-8")
    facts = {**environment(device), "backend": backend, "components": dict(suppliers)}
    (folder / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def keep_config(folder: Path, resolved: Resolved, backend: str) -> None:
    """The least that --resume needs to know of a run, in a folder that does not have it yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("config.yaml", config_text(resolved, backend)), ("environment.json", json.dumps({"backend": backend}) + "\n")):
        with contextlib.suppress(FileExistsError), open(folder / name, "x", encoding="utf-8") as file:
            file.write(text)


def config_text(resolved: Resolved, backend: str) -> str:
    """The resolved configuration as YAML, each line with its source; which `base.config.read_run` reads."""
    values = resolved.config.model_dump(mode="json")
    lines = [f"{key}: {_yaml(value)}" for key, value in values.items()]
    width = max(map(len, lines))
    root = str(Path(__file__).resolve().parents[1]) + os.sep
    notes = [resolved.sources.get(key, "default").replace(root, "") for key in values]
    body = "".join(f"{line:{width}}  # {note}\n" for line, note in zip(lines, notes, strict=True))
    return f"# backend: {backend}\n{body}"


def _yaml(value: Any) -> str:
    """A value on one line that reads back as it was: quoted where it would turn into something else, such as 1e-3 or two lines."""
    plain, quoted = (yaml.safe_dump(value, default_flow_style=True, default_style=s, width=10**6).splitlines()[0] for s in (None, '"'))
    return plain if parse_value(plain) == value else quoted


def commit() -> str:
    """The project's git commit, with ``+changes`` if the tree differs from it; ``unknown`` outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def environment(device: torch.device) -> dict:
    """Hardware, versions and commit of this process."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    memory = next((int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), None)
    accelerator = None
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        accelerator = {"name": module.get_device_name(device), "count": module.device_count()}
    return {
        "commit": commit(),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory,
        "device": device.type,
        "accelerator": accelerator,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def summary(config: Config, progress, images: int, folder: Path, reached: bool, backend: str, drawn: dict, missing: str) -> str:
    """The closing table of a run. ``drawn`` is `base.telemetry.whole_run`, and ``missing`` why there is no more of it."""
    best = progress.best
    ap = f"{best['AP']:.4f} after epoch {best['epoch']}" if best else "not measured"
    target = "no target" if config.target is None else f"target {config.target} {'reached' if reached else 'not reached'}"
    trained = progress.step * config.global_batch
    why = progress.unmeasured or missing
    most = drawn["memory_bytes"]
    memory = f"{most / 2**30:.2f} GiB at most, of one rank" if most else f"not measured ({why or 'no sensor told it'})"
    energy = f"not measured ({why or 'power was known for too little of the training'})"
    if drawn["joules"]:
        energy = f"{drawn['joules']:,.0f} J in training ({drawn['power_watts']:.1f} W), {drawn['images_per_joule']:.3g} images/J"
    rows = [
        ("mAP", f"{ap} ({target})"),
        (
            "images/s",
            f"{_rate(trained, progress.train_seconds)} training, {_rate(trained, progress.seconds)} with evaluation and checkpoints",
        ),
        ("time", f"{clock(progress.seconds)} for {progress.step} steps, {trained:,} images ({trained / images:.1f} epochs)"),
        ("memory", memory),
        ("energy", energy),
        ("backend", f"{backend}, {config.world_size} × {config.device}"),
        ("run folder", str(folder)),
    ]
    line = "─" * 72
    return "\n".join([line, *(f"{name:>10}  {text}" for name, text in rows), line])


def _rate(images: int, seconds: float) -> str:
    return f"{images / seconds:.1f}" if seconds > 0 else "not measured"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
