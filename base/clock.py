"""The run's own clock: a step's parts on the device's timeline, and the rates of a whole run, each with its boundaries."""

import time
from collections import Counter
from itertools import pairwise
from typing import Any

import torch

WARM_UP = 4  # first steps of a process whose parts are not told: compilers and tuners work in them


class Clock:
    """Marks between the parts of a step, set on the device's own timeline; none of them waits for the device.

    An accelerator's are events of torch, made with ``kind``; a CPU's are its host's clock. ``missing``: why there can be none.
    A step that has a ``clock`` is given this one, and calls `mark` after each of its parts.
    """

    def __init__(self, device: torch.device, **kind: bool):
        self.device, self.kind, self.marks, self.missing = device, kind, [], ""
        self.reused = False  # whether marks belong to a captured graph: then only those of the last step launched can be read
        self.left, self.steps, self.seconds = WARM_UP, 0, Counter()  # of parts that `told` has not told yet
        try:
            self._now()
        except (AttributeError, RuntimeError, TypeError) as error:
            self.missing = f"this torch has no such events for {device.type}: {error}"

    def start(self) -> None:
        """A step begins."""
        self.marks = []
        self.mark("")

    def mark(self, part: str) -> None:
        """``part`` of a step ends; it began at the mark before."""
        if not self.missing:
            self.marks.append((part, self._now()))

    def _now(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self.device).Event(enable_timing=True, **self.kind)
        event.record()
        return event

    def add(self, marks: list[tuple[str, Any]], last: bool) -> float:
        """Takes over the marks of a step that is done, the ``last`` one launched or not: → seconds of the whole step."""
        if not marks:
            return 0.0
        self.left -= 1
        if self.left < 0 and (last or not self.reused):
            self.steps += 1
            self.seconds["step"] += between(marks[0][1], marks[-1][1])
            for (_, before), (part, after) in pairwise(marks):
                self.seconds[part] += between(before, after)
        return between(marks[0][1], marks[-1][1])

    def told(self) -> dict[str, Any]:
        """How many steps were added since the last call, and the mean seconds of a step and of each of its parts."""
        told = {f"{part}_seconds": round(seconds / self.steps, 7) for part, seconds in self.seconds.items()}
        steps, self.steps, self.seconds = self.steps, 0, Counter()
        return {"steps": steps, **told} if steps else {}


class Later:
    """A number that a step leaves on its device, copied to the host right behind the step: `item` does not wait for steps launched since."""

    def __init__(self, value: torch.Tensor):
        self.value, self.there = value, None
        if value.device.type != "cpu" and hasattr(module := torch.get_device_module(value.device), "Event"):  # without events `item` waits for all
            self.value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self.there = module.Event()
            self.there.record()

    def item(self) -> float:
        if self.there is not None:
            self.there.synchronize()
        return self.value.item()


def between(before: Any, after: Any) -> float:
    """Seconds between two marks that the device has passed."""
    if isinstance(before, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def whole_run(progress, images: int, run_seconds: float | None, reached: bool) -> dict[str, float | None]:
    """A run's times in seconds and its ``images`` a second within each of three boundaries; None is not measured."""
    timed = progress.timed_steps == progress.step
    boundaries = {"raw": run_seconds, "training": progress.train_seconds, "compute": progress.step_seconds if timed else None}
    return {
        "images": images,
        "run_seconds": run_seconds,
        "target_seconds": run_seconds if reached else None,
        "train_seconds": round(progress.train_seconds, 3),
        **{key: round(getattr(progress, key), 3) if timed else None for key in ("data_seconds", "step_seconds")},
        **{f"images_per_second_{name}": round(images / seconds, 3) if seconds else None for name, seconds in boundaries.items()},
        "resumed": progress.resumed,
    }


def rows(whole: dict[str, Any], no_target: bool) -> list[tuple[str, str]]:
    """What the closing table says of `whole_run`."""
    raw, training, compute = (
        f"{value:.1f}" if (value := whole[f"images_per_second_{name}"]) else "not measured" for name in ("raw", "training", "compute")
    )
    breaks = f", with the breaks of {whole['resumed']} resumption{'s' * (whole['resumed'] > 1)}" * bool(whole["resumed"])
    target = "no target" if no_target else "not reached"
    if whole["target_seconds"] is not None:
        target = f"{whole['target_seconds']:,.1f} s, from MLPerf's run_start to run_stop{breaks}"
    return [
        ("to target", target),
        ("images/s", f"{raw} raw: every image, from MLPerf's run_start to run_stop{breaks}"),
        ("", f"{training} without evaluation and checkpoints: the training loop, its wait for data included"),
        ("", f"{compute} pure compute: the steps alone, from a batch in memory to the new weights"),
    ]
