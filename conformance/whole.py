"""Checks of all components together: thirty steps beside the reference's, and what a short run of the launcher leaves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from base import checkpoint
from base.config import read_run
from base.contracts import FIGURES
from base.errors import UserError
from conformance.model import SMALL, flat, same_models
from conformance.parts import Found, Kit
from data_sets.demo_data import generate

STEPS, BATCH, RATE_A_STEP = 30, 8, 3e-4  # the demo's warm-up: its rate rises to 0.03 in 100 steps
# Of a mean of ten losses: what differs in the last bit grows from step to step, in float32 to 1.3 % in the last ten (seen), and a loader that
# decodes in its own way or a lower precision starts with more.
FOLLOWED = 0.05
EVENTS = ("init_start", "init_stop", "run_start", "train_samples", "epoch_start", "epoch_stop", "eval_start", "eval_accuracy", "run_stop")
FILES = {"checkpoints", "config.yaml", "environment.json", "log.txt", "metrics.jsonl", "mlperf.log"}


def demo(kit: Kit) -> Path:
    folder = kit.scratch / "demo"
    generate(folder, train=72, val=24, size=96, seed=kit.seed)
    return folder


def thirty_steps(kit: Kit) -> Found:
    """Each backend with all of its own components, from the same weights and the same seed; what a loss scale skips is left out of both."""
    data, losses, skipped = demo(kit), [], set()
    options = {**SMALL, "num_classes": 1 + len(json.loads((data / "annotations/instances_train2017.json").read_text())["categories"])}
    backends = (kit.backend, kit.reference)
    for backend, model in zip(backends, same_models(kit, options), strict=True):
        loader = backend.train_loader(
            annotation_file=data / "annotations/instances_train2017.json", image_dir=data / "train2017", image_size=(96, 96), batch_size=BATCH,
            workers=1, seed=kit.seed,
        )  # fmt: skip
        optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        step = backend.step(model=model, optimizer=optimizer, matcher=backend.matcher, loss=backend.loss, device=kit.device)
        losses.append([])
        for epoch in range(-(-STEPS // len(loader))):
            loader.set_epoch(epoch)
            for n, batch in enumerate(loader, len(loader) * epoch + 1):
                if n in skipped:
                    continue
                before = flat(model.parameters())
                loss = step(batch, RATE_A_STEP * n).item()
                if step.state_dict() and torch.equal(flat(model.parameters()), before):
                    skipped.add(n)
                else:
                    losses[-1].append(loss)
    got, want = (np.array(some[:STEPS]) for some in losses)
    yield "first loss", abs(got[0] / want[0] - 1), 0.01
    for part in (slice(0, 10), slice(10, 20), slice(20, STEPS)):
        yield f"losses of steps {part.start + 1} to {part.stop}, their mean", abs(got[part].mean() / want[part].mean() - 1), FOLLOWED


def records_of_a_run(kit: Kit) -> Found:
    """Three steps and an evaluation through the launcher."""
    flags = {"name": kit.backend.name, "config": "demo", "data_dir": demo(kit), "batch_size": BATCH, "eval_batch_size": 16, "max_steps": 3}
    flags |= {"target": "null", "log_every": 1, "seed": kit.seed, "device": kit.device.type, "runs_dir": kit.scratch, "run_name": "run", "nproc": 1}
    flags["report"] = "false"
    command = [sys.executable, "-m", "base", "train", "--image_size", "96", "96", "--strides", *"111111"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    command += ["--use", *(f"{slot}={name}" for slot, name in kit.use.items())] if kit.use else []
    root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise UserError(f"the run ended with code {done.returncode}: {done.stderr.strip()[-200:]}")
    yield "files of a run", len({path.name for path in (kit.scratch / "run").iterdir()} ^ FILES), 0
    yield "config, metrics, log, checkpoints", len(faults(kit.scratch / "run", 3, dict(kit.backend.suppliers))), 0
    yield "entries of mlperf.log, in order", len(events(kit.scratch / "run")), 0


def faults(run: Path, steps: int, suppliers: dict[str, str]) -> list[str]:
    """What is not as it should be in the folder of a run of ``steps`` steps that recorded each and evaluated once."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluation = next((line for line in metrics if line["kind"] == "evaluation"), {})
    kinds = [line["kind"] for line in metrics if line["kind"] not in ("telemetry", "parts")]
    facts = {
        "config.yaml": read_run(run / "config.yaml").max_steps == steps,
        "components in environment.json": json.loads((run / "environment.json").read_text())["components"] == suppliers,
        "kinds in metrics.jsonl": kinds == ["train"] * steps + ["evaluation", "end"],
        "losses": all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in metrics if line["kind"] == "train"),
        "figures": all(-1 <= evaluation.get(name, -2) <= 1 for name in FIGURES),
        "log.txt": f"epoch 1: mAP {evaluation.get('AP', -2):.4f}" in (run / "log.txt").read_text(),
        "best.pt": checkpoint.read(run / "checkpoints" / "best.pt")["progress"]["step"] == steps,
    }
    return [name for name, holds in facts.items() if not holds]


def events(run: Path) -> list[str]:
    """MLPerf's events that are missing from the log or come before one that they should follow."""
    keys = [json.loads(line.split(" ", 1)[1])["key"] for line in (run / "mlperf.log").read_text().splitlines()]
    places = [keys.index(key) if key in keys else -1 for key in EVENTS]
    return [key for key, place, before in zip(EVENTS, places, [-1, *places], strict=False) if place <= before]


CHECKS = {"run": (thirty_steps, records_of_a_run)}
