"""Runs that are disturbed from outside: waiting for the moment, finding their processes, and holding them to a run that nobody disturbed."""

import json
import subprocess
import time
from pathlib import Path

import pytest
import torch

from base import checkpoint
from tests.conftest import losses

OF_TIME = {  # in metrics.jsonl
    "time", "seconds", "images_per_second", "data_seconds", "detection_seconds", "run_seconds", "target_seconds", "train_seconds",
    "step_seconds", "images_per_second_raw", "images_per_second_training", "images_per_second_compute",
}  # fmt: skip
OF_THE_MACHINE = {"memory_bytes", "joules", "power_watts", "images_per_joule", "resumed"}  # all else is the same in every run


def wait_for(condition, process: subprocess.Popen | None = None, seconds: float = 120.0, pause: float = 0.02, told=lambda: ""):
    """Polls until the condition gives something, or the process or the time is over; ``told`` is what else to say then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        if process is not None and process.poll() is not None:
            pytest.fail(f"the run ended early: {process.communicate()}")
        time.sleep(pause)
    if process is not None:
        process.kill()
    return pytest.fail(f"not within {seconds} s: {told()}")


def steps_done(run: Path) -> int:
    return len(losses(run)) if (run / "metrics.jsonl").exists() else 0


def rank_pids(launcher: int) -> list[int]:
    """The rank processes of a run: the launcher's children."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        if parent == launcher:
            found.append(int(status.parent.name))
    return sorted(found)


def final_state(run: Path) -> dict:
    return checkpoint.read(checkpoint.listed(run)[0])


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] not in ("telemetry", "parts")]
    return [{key: value for key, value in line.items() if key not in OF_TIME | OF_THE_MACHINE} for line in lines]


def mlperf_events(run: Path) -> list[dict]:
    return [json.loads(line.split(" ", 1)[1]) for line in (run / "mlperf.log").read_text().splitlines()]


def assert_same(run: Path, undisturbed: Path) -> None:
    """Bitwise: weights, momentum, losses; and the same evaluations, records without gaps or repetitions, nothing left behind."""
    for got, want in [
        (final_state(run), final_state(undisturbed)),
        tuple(checkpoint.read(r / "checkpoints" / "best.pt") for r in (run, undisturbed)),
    ]:
        assert got["progress"]["step"] == want["progress"]["step"]
        assert got["progress"]["evaluations"] == want["progress"]["evaluations"]
        assert got["model"].keys() == want["model"].keys()
        for name, tensor in want["model"].items():
            assert torch.equal(got["model"][name], tensor), name
        for number, state in want["optimizer"]["state"].items():
            assert torch.equal(got["optimizer"]["state"][number]["momentum_buffer"], state["momentum_buffer"])
    assert losses(run) == losses(undisturbed)
    got, want = (sorted(map(json.dumps, metrics(r))) for r in (run, undisturbed))  # an evaluation in the background comes in when it does
    assert got == want
    events = mlperf_events(run)
    assert [(e["event_type"], e["key"], e["value"]) for e in events] == [(e["event_type"], e["key"], e["value"]) for e in mlperf_events(undisturbed)]
    assert all(one["time_ms"] <= then["time_ms"] for one, then in zip(events, events[1:], strict=False))
    assert not list((run / "checkpoints").glob(".*")) and not list(run.glob(".*"))


def small_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "step-000000001.pt"
    content = dict.fromkeys(("config", "progress", "categories", "model", "optimizer", "step", "loaders"), {})
    checkpoint.write(path, {"format": checkpoint.FORMAT, **content, "model": {"weight": torch.arange(1000.0)}})
    return path
