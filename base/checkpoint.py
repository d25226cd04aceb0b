"""Checkpoints: written whole or not at all, read by safe means, resumed exactly."""

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.config import Config
from base.errors import UserError
from base.weights import from_mlperf, is_mlperf, read_tensors

FORMAT = 1
ARCHITECTURE = ("backbone", "image_size", "strides")  # keys of the configuration that fix the shape of the weights
NAME = re.compile(r"step-(\d{9})\.pt")
ITERATION = re.compile(r"iter_(\d{1,9})(?:\.pt)?")


@dataclass
class Progress:
    """Where a run is; what the loop needs to go on, and the records to be cut back to."""

    step: int = 0  # steps done
    seconds: float = 0.0  # of training and evaluation so far
    train_seconds: float = 0.0  # of which not evaluation or checkpoints
    data_seconds: float = 0.0  # of which the first rank waited for its loader
    step_seconds: float = 0.0  # of its device in training steps
    timed_steps: int = 0  # steps that the two above are of: all, unless they were not counted in a part of the run
    resumed: int = 0  # times that the run went on from a checkpoint and came to the next
    evaluations: list[dict] = field(default_factory=list)  # {"epoch": …, "AP": …, …}
    memory_bytes: int = 0  # the most that a device had in use
    joules: float = 0.0  # that all devices drew in training
    joules_seconds: float = 0.0  # of training in which that was known, mean over devices
    unmeasured: str = ""  # why it was not known all the time; the first reason
    record_bytes: dict[str, int] = field(default_factory=dict)  # length of each record file at this point

    def evaluated(self, epoch: int) -> bool:
        return any(figures["epoch"] == epoch for figures in self.evaluations)

    @property
    def best(self) -> dict | None:
        """The evaluation with the highest AP."""
        return max(self.evaluations, key=lambda figures: figures["AP"], default=None)


def pack(config: Config, progress: Progress, categories: dict, model, optimizer, step, loaders: list) -> dict:
    """Everything a checkpoint holds, on the CPU. ``loaders``: one state a rank, or nothing."""
    return {
        "format": FORMAT,
        "config": config.model_dump(mode="json"),
        "progress": asdict(progress),
        "categories": categories,
        "model": _on_cpu(model.state_dict()),
        "optimizer": _on_cpu(optimizer.state_dict()),
        "step": _on_cpu(step.state_dict()),
        "loaders": loaders,
    }


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_on_cpu(item) for item in value]
    return value


def write(path: Path, content: dict) -> None:
    """Writes a checkpoint under a temporary name, forces it to the disk, then renames it: a crash leaves the old or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):  # a folder that has become read-only
            temporary.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free / 2**20
        raise UserError(
            f"checkpoint {path} could not be written ({_plain(error)}); {free:.0f} MiB are free there; the earlier ones are whole"
        ) from error


def _plain(error: Exception) -> str:
    """What the system said, for torch.save's "PytorchStreamWriter failed writing file …" too."""
    first = error.__context__ if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError) else error
    return getattr(first, "strerror", None) or str(first)


def sync_folder(folder: Path) -> None:
    """Forces a rename in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def step_path(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return run / "checkpoints" / f"step-{step:09d}.pt"


def listed(run: Path) -> list[Path]:
    """The step checkpoints of a run, latest first."""
    return sorted((p for p in (run / "checkpoints").glob("step-*.pt") if NAME.fullmatch(p.name)), reverse=True)


def keep_best(run: Path, step: int, evaluations: list[dict]) -> None:
    """Writes ``best.pt``: the checkpoint after ``step`` steps, with the evaluation of it that is known by now."""
    content = read(step_path(run, step))
    content["progress"]["evaluations"] = evaluations
    write(run / "checkpoints" / "best.pt", content)


def prune(run: Path, keep: int) -> None:
    """Removes all but the latest ``keep``, and what a killed writer left behind."""
    _remove([*listed(run)[keep:], *_unfinished(run)])


def sweep(run: Path) -> None:
    """Removes what a killed writer left behind; no other process may be writing."""
    _remove(_unfinished(run))


def _unfinished(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob(".*.tmp"))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"{path} cannot be removed ({error.strerror}); make its folder writable") from error


def read(path: Path) -> dict:
    """A checkpoint of this project, checked. Raises UserError."""
    content = read_tensors(path)
    if not isinstance(content, dict) or "format" not in content:
        raise UserError(f"{path} is not a checkpoint of this project")
    if content["format"] != FORMAT:
        raise UserError(f"{path} has checkpoint format {content['format']!r}; this version reads {FORMAT}")
    if missing := {"config", "progress", "categories", "model", "optimizer", "step", "loaders"} - content.keys():
        raise UserError(f"{path} is not a whole checkpoint: it lacks {', '.join(sorted(missing))}")
    return content


def latest(run: Path, log: Callable[[str], None]) -> tuple[Path, dict] | None:
    """The latest readable checkpoint of a run; one that is damaged is named in the log and the one before it taken."""
    if not run.is_dir():
        raise UserError(f"run folder {run} does not exist")
    problems = []
    for path in listed(run):
        try:
            return path, read(path)
        except UserError as error:
            problems.append(str(error))
            log(f"{error}; trying the one before it")
    if problems:
        raise UserError(f"no checkpoint of {run} can be read: {'; '.join(problems)}")
    return None


def load_model(model: torch.nn.Module, content: dict, path: Path, config: Config | None = None) -> None:
    """Puts a checkpoint's weights into a model of the same architecture. Raises UserError naming the first difference."""
    if config is not None:
        stored = content["config"]
        here = config.model_dump(mode="json")
        if different := [key for key in ARCHITECTURE if stored.get(key) != here[key]]:
            key = different[0]
            earlier = [p.name for p in listed(path.parent.parent) if p.name < path.name]
            hint = f"; an earlier one is {path.parent / earlier[0]}" if earlier else ""
            raise UserError(f"{path} belongs to another architecture: {key} {stored.get(key)!r} instead of {here[key]!r}{hint}")
    load_weights(model, content["model"], path)


def read_weights(path: Path) -> tuple[dict, dict | None]:
    """The model's state dict of a checkpoint of this project or of the MLPerf reference, and the whole content if it is ours."""
    content = read_tensors(path)
    if isinstance(content, dict) and "format" in content:
        return read(path)["model"], content
    state = content.get("model", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict) or not is_mlperf(state):
        raise UserError(f"{path} is neither a checkpoint of this project nor one of the MLPerf reference")
    return from_mlperf(state), None


def found_in(path: str | Path) -> Path:
    """A checkpoint's file: itself, or of a run's folder (or its folder checkpoints/) the best, else the latest; of stages the last one's.

    ``RUN/iter_N``, as MLPerf's reference names them, is the checkpoint of a run after N steps. Raises UserError if there is none.
    """
    path = Path(path)
    if not path.exists() and (step := ITERATION.fullmatch(path.name)):
        path = step_path(path.parent, int(step[1]))
    if not path.exists() and path.parent.name == "checkpoints" and (kept := sorted(file.name for file in path.parent.glob("*.pt"))):
        raise UserError(f"{path} does not exist; {path.parent} has {', '.join(kept)} (--keep_checkpoints says how many are kept)")
    if not path.is_dir():
        return path
    run = path.parent if path.name == "checkpoints" else path
    best = run / "checkpoints" / "best.pt"
    if found := [best] * best.is_file() or listed(run):
        return found[0]
    for stage in sorted(run.glob("stage-*"), key=lambda folder: (len(folder.name), folder.name), reverse=True):
        if (stage / "checkpoints").is_dir():
            return found_in(stage)
    raise UserError(f"{path} has no checkpoint in it")


def carry_over(model: torch.nn.Module, path: Path, categories: dict) -> list[str]:
    """Begins a model with a checkpoint's weights, whatever its image size and strides: → the weights that could not be taken.

    Class heads are taken only if the classes are the same (``categories``: ids and names; of the MLPerf reference only their number is
    known). Raises UserError if the backbone is another.
    """
    state, content = read_weights(path)
    wanted = model.state_dict()
    other_classes = content is not None and content["categories"] != categories
    fits = {
        name: state[name]
        for name, tensor in wanted.items()
        if isinstance(state.get(name), torch.Tensor) and state[name].shape == tensor.shape and not (other_classes and name.startswith("class_heads."))
    }
    left = [name for name in wanted if name not in fits]
    if strange := [name for name in left if name.startswith("backbone.")]:
        raise UserError(f"{path} has another backbone: it lacks {strange[0]} {tuple(wanted[strange[0]].shape)}; is --backbone right?")
    model.load_state_dict({**wanted, **fits})
    return left


def load_weights(model: torch.nn.Module, state: dict, path: Path) -> None:
    """A state dict into a model. Raises UserError naming the first difference."""
    wanted = model.state_dict()
    for name in [*wanted, *state]:
        if name not in state or name not in wanted:
            raise UserError(f"{path} belongs to another architecture: it {'lacks' if name in wanted else 'has'} {name!r}")
        if not isinstance(state[name], torch.Tensor) or state[name].shape != wanted[name].shape:
            shape = tuple(getattr(state[name], "shape", ()))
            raise UserError(
                f"{path} belongs to another architecture or number of classes: {name} {shape} instead of {tuple(wanted[name].shape)}"
            )
    model.load_state_dict(state)
