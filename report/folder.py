"""What a run's folder holds, as far as it is there: a run that was cut off, or still writes, is read like any other."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from base import checkpoint
from base.config import Config, parse_value, read_run
from base.contracts import FIGURES
from base.errors import UserError
from base.tools.finished import MEMBER, members_of
from pages.text import shown

LOG_BYTES = 1 << 16  # of the end of log.txt
NEEDED = {  # kind of a line of metrics.jsonl → the numbers that it must have
    "train": ("time", "step", "epoch", "loss", "learning_rate", "images_per_second", "data_seconds"),
    "evaluation": ("step", "epoch", "seconds", *FIGURES),
    "telemetry": ("step",),
    "parts": ("step", "steps", "step_seconds"),
    "end": ("steps", "seconds"),
}


@dataclass
class RunFolder:
    """The records of one run. ``missing`` says in sentences what is not there or cannot be read."""

    folder: Path
    name: str
    values: dict[str, Any] = field(default_factory=dict)  # config.yaml as it stands
    sources: dict[str, str] = field(default_factory=dict)  # key → the file or flag that set it
    config: Config | None = None  # of the values, if this version knows them
    facts: dict[str, Any] = field(default_factory=dict)  # environment.json
    lines: dict[str, list[dict]] = field(default_factory=lambda: {kind: [] for kind in NEEDED})  # metrics.jsonl by kind
    events: list[dict] = field(default_factory=list)  # mlperf.log
    log: list[str] = field(default_factory=list)  # the end of log.txt
    progress: dict[str, Any] = field(default_factory=dict)  # of the latest checkpoint: seconds of training so far, as `base.checkpoint.Progress`
    missing: list[str] = field(default_factory=list)

    @property
    def end(self) -> dict | None:
        """What the run recorded as its last, if it came to its end."""
        return self.lines["end"][-1] if self.lines["end"] else None

    @property
    def backend(self) -> str | None:
        name = self.facts.get("backend")
        return name if isinstance(name, str) else None


def runs_in(path: Path) -> list[Path]:
    """The folder of a run itself, or those of its stages or trials. Raises UserError if it is neither."""
    if not path.is_dir():
        raise UserError(f"{path} is no run's folder: {'it is a file' if path.exists() else 'it does not exist'}")
    if any((path / name).is_file() for name in ("metrics.jsonl", "log.txt")):
        return [path]
    if members := members_of(path):
        return members
    if (path / "config.yaml").is_file():
        return [path]
    raise UserError(f"{path} is no run's folder: it has no config.yaml, metrics.jsonl or log.txt; name a folder that run_training.sh made")


def read_folder(path: Path) -> RunFolder:
    """Reads what is there; only a folder that cannot be read at all is an error."""
    whole = path.resolve()
    name = f"{whole.parent.name}/{whole.name}" if MEMBER.fullmatch(whole.name) else whole.name
    run = RunFolder(path, name)
    text = _text(run, "config.yaml")
    if text:
        values = parse_value(text)
        run.values = values if isinstance(values, dict) else {}
        run.sources = dict(filter(None, map(_source, text.splitlines())))
        try:
            run.config = read_run(path / "config.yaml")
        except UserError as error:
            run.missing.append(f"config.yaml cannot be used: {error}")
    facts = _json(run, "environment.json", _text(run, "environment.json"))
    run.facts = facts if isinstance(facts, dict) else {}
    for kind, line in _metrics(run, _text(run, "metrics.jsonl")):
        run.lines[kind].append(line)
    run.events = _events(_text(run, "mlperf.log"))
    run.log = _text(run, "log.txt").splitlines()
    try:
        found = checkpoint.latest(path, run.missing.append)
        if found is None:
            run.missing.append("checkpoints/ has no checkpoint of a step")
        elif isinstance(found[1]["progress"], dict):
            run.progress = {key: value for key, value in found[1]["progress"].items() if is_number(value)}
    except UserError as error:
        run.missing.append(str(error))
    return run


def _text(run: RunFolder, name: str) -> str:
    try:
        data = (run.folder / name).read_bytes()
    except OSError as error:
        run.missing.append(f"{name} cannot be read: {error.strerror}")
        return ""
    if not data:
        run.missing.append(f"{name} is empty")
    return (data[-LOG_BYTES:] if name == "log.txt" else data).decode("utf-8", errors="replace")


def _json(run: RunFolder, name: str, text: str) -> Any:
    try:
        return json.loads(text) if text else None
    except (ValueError, RecursionError) as error:
        run.missing.append(f"{name} is not whole: {error}")
        return None


def _source(line: str) -> tuple[str, str] | None:
    """The key of a line of config.yaml, and its comment."""
    try:
        tokens = [token for token in yaml.scan(line) if token.end_mark.index > token.start_mark.index]
    except yaml.YAMLError:
        return None
    key, _, rest = line.partition(":")
    if not tokens or not rest:
        return None
    return key, line[tokens[-1].end_mark.column :].strip().removeprefix("#").strip()


def _metrics(run: RunFolder, text: str) -> Sequence[tuple[str, dict]]:
    """(kind, line) of every line that is as it should be; the others are counted."""
    lines, good, bad = text.split("\n"), [], []
    cut = lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        kind = values.get("kind") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind in NEEDED and all(map(is_number, map(values.get, NEEDED[kind]))):
            good.append((kind, values))
        else:
            bad.append(number)
    if bad:
        run.missing.append(f"metrics.jsonl: {len(bad):,} of {len(lines):,} lines cannot be used, the first is line {bad[0]}")
    if cut:
        run.missing.append(f"metrics.jsonl: the last line is cut off: {shown(cut, 60)}")
    return good


def _events(text: str) -> list[dict]:
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line.partition(" ")[2])
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and is_number(event.get("time_ms")) and isinstance(event.get("key"), str):
            events.append(event)
    return events


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number to reckon with: finite, and not one of 400 digits."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def flattened(values: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested values, of configuration or environment, as text, by names such as ``packages.torch``."""
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flattened(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return flat
