"""The lines of metrics.jsonl as TensorBoard's scalars: ``tensorboard --logdir <run>/tensorboard``.

A tag is a line's kind and key, such as ``train/loss``, ``evaluation/AP`` or ``telemetry/training/power_watts``.
"""

import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from base.errors import UserError

NO_SCALARS = ("time", "step", "steps", "epoch")  # of a line, that place it


def check() -> None:
    """Raises UserError if the package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise UserError(f"--tensorboard needs the package 'tensorboard', which is not installed: {sys.executable} -m pip install tensorboard")


class EventFiles:
    """Writes them into a run's folder. They begin with the lines that metrics.jsonl has, so those of a run that goes on hold nothing twice."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        self.place = folder / "tensorboard"
        try:
            for old in self.place.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = SummaryWriter(self.place, flush_secs=10)
        except OSError as error:
            raise self._unwritten(error) from error
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            self.add(json.loads(line))

    def add(self, line: dict[str, Any]) -> None:
        """The numbers of one line. Raises UserError if they cannot be written."""
        prefix = "/".join(line[key] for key in ("kind", "phase") if key in line)
        step = line["step"] if "step" in line else line["steps"]
        for key, value in line.items():
            if isinstance(value, (int, float)) and key not in NO_SCALARS:
                try:
                    self.writer.add_scalar(f"{prefix}/{key}", value, step, line["time"])
                except OSError as error:
                    raise self._unwritten(error) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # metrics.jsonl has them
            self.writer.close()

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"{self.place} cannot be written ({error.strerror}); make room, then --resume {self.place.parent}")
