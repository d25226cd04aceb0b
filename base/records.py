"""The folder of a run: configuration, environment, metrics as JSON lines, a log and the MLPerf log."""

import errno
import fcntl
import json
import os
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch
import yaml

from base import clock
from base.config import Config, Resolved, parse_value
from base.errors import UserError
from base.terminal import Display
from formats.mlperf import MLPerfLog, run_seconds
from formats.tensorboard import EventFiles

CUT_BACK = ("metrics.jsonl", "mlperf.log")  # a resumed run cuts these to where its checkpoint was written
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "pycocotools", "pydantic", "mlperf-logging")


class Records:
    """Writes a run's folder. ``folder`` None (ranks after the first): every method does nothing.

    What cannot be written, as on a full disk, is kept as ``failure``; the loop ends all ranks with it before the next step.
    Raises UserError if the folder cannot be written at all, or another process still writes it ``patience`` seconds later.
    """

    def __init__(self, folder: Path | None, display: Display, patience: float = 120.0):
        self.folder, self.display, self.failure, self.files = folder, display, None, {}
        self.events: EventFiles | None = None  # TensorBoard's, if they are asked for
        if folder is not None:
            try:
                (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                self.files = {name: open(folder / name, "ab", buffering=0) for name in ("log.txt", *CUT_BACK)}
                locked = _lock(self.files["log.txt"], folder, patience)
            except OSError as error:
                raise UserError(f"run folder {folder} cannot be written ({error.strerror}); choose another with --runs_dir") from error
            if not locked:
                self.log("this file system has no locks: nothing keeps a second run from writing to the same folder")
        self.mlperf = MLPerfLog((lambda line: self._append("mlperf.log", line)) if folder else None)

    def metric(self, kind: str, **values) -> None:
        """One line of metrics.jsonl."""
        line = {"kind": kind, "time": round(time.time(), 3), **values}
        self._append("metrics.jsonl", json.dumps(line))
        if self.events and not self.failure:
            try:
                self.events.add(line)
            except UserError as error:
                self.failure = error

    def open_events(self) -> None:
        """From now on TensorBoard has what metrics.jsonl has, and what it had before. Raises UserError."""
        self.events = EventFiles(self.folder)

    def log(self, line: str) -> None:
        """One line to the terminal and to log.txt."""
        self._append("log.txt", log_line(line))
        if self.folder:
            self.display.line(line)

    def _append(self, name: str, line: str) -> None:
        if self.folder is None or self.failure:  # after a line that is missing there is none
            return
        data = f"{line}\n".encode()
        try:
            if self.files[name].write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.failure = UserError(f"{self.folder / name} cannot be written ({error.strerror}); make room, then --resume {self.folder}")

    def check(self) -> None:
        """Raises UserError if something could not be written."""
        if self.failure:
            raise self.failure

    def sizes(self) -> dict[str, int]:
        """The present length in bytes of the files that a resumed run cuts back."""
        return {name: (self.folder / name).stat().st_size for name in CUT_BACK} if self.folder else {}

    def cut_back(self, sizes: dict[str, int]) -> None:
        """Cuts the records to the lengths that a checkpoint states: what came after it will be done again."""
        for name in CUT_BACK if self.folder else ():
            os.truncate(self.folder / name, min(sizes.get(name, 0), (self.folder / name).stat().st_size))
        if self.folder and (stamps := re.findall(r'"time_ms": (\d+)', (self.folder / "mlperf.log").read_text(encoding="utf-8"))):
            self.mlperf.follow(int(stamps[-1]))

    def run_seconds(self) -> float | None:
        """MLPerf's time of the run, by the log that has it."""
        return run_seconds((self.folder / "mlperf.log").read_text(encoding="utf-8")) if self.folder else None

    def close(self) -> None:
        self.display.close()
        if self.events:
            self.events.close()
        for file in self.files.values():
            file.close()


def log_line(text: str) -> str:
    """A line of log.txt."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"


def _lock(file: BinaryIO, folder: Path, patience: float) -> bool:
    """Waits until no other process has the run folder: one whose launcher was killed ends after its step. False: no locks there.

    The lock is a process's own (POSIX): it goes with it, and loader processes do not inherit it.
    """
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return False
            if time.monotonic() > end:
                raise UserError(f"run folder {folder} is still written by another process; end that run first") from error
            time.sleep(0.2)


def write_start(folder: Path, resolved: Resolved, backend: str, suppliers: dict[str, str], device: torch.device) -> None:
    """config.yaml with where each value comes from, and environment.json. Raises UserError if they cannot be written."""
    _write(folder, "config.yaml", config_text(resolved, backend))
    _write(folder, "environment.json", _json({**environment(device), "backend": backend, "components": dict(suppliers)}))


def keep_config(folder: Path, resolved: Resolved, backend: str, changed: bool = False) -> None:
    """The least that --resume needs to know of a run, in a folder that does not have it yet; ``changed``: or has it otherwise. Raises UserError."""
    for name, text in (("config.yaml", config_text(resolved, backend)), ("environment.json", _json({"backend": backend}))):
        if changed or not (folder / name).exists():
            _write(folder, name, text)


def _json(facts: dict) -> str:
    return json.dumps(facts, indent=2) + "\n"


def _write(folder: Path, name: str, text: str) -> None:
    """A file of a run's folder, whole or not at all."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f".{name}").write_text(text, encoding="utf-8")
        os.replace(folder / f".{name}", folder / name)
    except OSError as error:
        raise UserError(f"{folder / name} cannot be written ({error.strerror}); choose another folder with --runs_dir") from error


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


def summary(config: Config, progress, images: int, folder: Path, reached: bool, backend: str, whole: dict, missing: str) -> str:
    """The closing table of a run. ``whole``: `whole_run` of `base.clock` and `base.telemetry`; ``missing``: why that has no more."""
    best = progress.best
    ap = f"{best['AP']:.4f} after epoch {best['epoch']}" if best else "not measured"
    target = "no target" if config.target is None else f"target {config.target} {'reached' if reached else 'not reached'}"
    trained = progress.step * config.global_batch
    why = progress.unmeasured or missing
    most = whole["memory_bytes"]
    memory = f"{most / 2**30:.2f} GiB at most, of one rank" if most else f"not measured ({why or 'no sensor told it'})"
    energy = f"not measured ({why or 'power was known for too little of the training'})"
    if whole["joules"]:
        energy = f"{whole['joules']:,.0f} J in training ({whole['power_watts']:.1f} W), {whole['images_per_joule']:.3g} images/J"
    rows = [
        ("mAP", f"{ap} ({target})"),
        *clock.rows(whole, no_target=config.target is None),
        ("time", f"{minutes(progress.seconds)} from the first batch on: {progress.step} steps, {trained:,} images ({trained / images:.1f} epochs)"),
        ("memory", memory),
        ("energy", energy),
        ("backend", f"{backend}, {config.world_size} × {config.device}"),
        ("run folder", str(folder)),
    ]
    line = "─" * 72
    return "\n".join([line, *(f"{name:>10}  {text}" for name, text in rows), line])


def minutes(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    whole, rest = divmod(int(seconds), 60)
    hours, whole = divmod(whole, 60)
    return f"{hours}:{whole:02}:{rest:02}" if hours else f"{whole}:{rest:02}"
