"""A run on one rank: its components, built in the order that MLPerf's rules and resuming ask for."""

import os
import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base import checkpoint
from base.affinity import bind
from base.backend import Backend, load_backend
from base.checkpoint import Progress
from base.clock import Clock
from base.config import Config, Resolved
from base.contracts import Loader, Step
from base.distributed import Ranks
from base.evaluate import Background, make_eval_loader
from base.records import Records, environment, keep_config, write_start
from base.telemetry import Sampler
from base.weights import load_backbone
from data_sets.index import AnnotationIndex


class StopRequest:
    """Notes SIGTERM and Ctrl-C, and a launcher that is gone; a second signal ends the process at once."""

    def __init__(self):
        self.asked, self.parent = False, int(os.environ.get("SSD_LAUNCHER", os.getppid()))  # it may be gone by now
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def __call__(self) -> bool:
        return self.asked or os.getppid() != self.parent


@dataclass
class Run:
    """What the loop works with, on one rank."""

    config: Config
    folder: Path
    ranks: Ranks
    stopped: StopRequest
    records: Records
    backend: Backend
    model: torch.nn.Module
    optimizer: Any
    step: Step
    train_loader: Loader
    eval_loader: Loader
    images: int  # training images with boxes
    categories: dict
    telemetry: Sampler
    clock: Clock
    progress: Progress = field(default_factory=Progress)
    skipped: set[str] = field(default_factory=set)  # images that could not be read and have been listed
    evaluating: tuple[int, int, float, float] | None = None  # in the background: (epoch, step, start, seconds of detection), on every rank
    evaluation: Background | None = None  # and its process, on the first
    launched: deque = field(default_factory=deque)  # steps not read yet: (step, rate, image ids, loss, seconds waited, marks)

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_loader)

    @property
    def total_steps(self) -> int:
        whole = self.config.epochs * self.steps_per_epoch
        return min(whole, self.config.max_steps or whole)


def left_by(folder: Path, records: Records) -> tuple[Path, dict] | None:
    """The latest checkpoint of a run that goes on, if it has come to one; its records are cut back, and what a killed writer left removed.

    Only the first rank looks: the others might see another one, or have no such folder.
    """
    found = checkpoint.latest(folder, records.log)
    checkpoint.sweep(folder)
    records.cut_back(found[1]["progress"]["record_bytes"] if found else {})
    if not found:
        records.log("there is no checkpoint yet: starting from the beginning")
    return found


def set_up(
    config: Config, name: str, folder: Path, resume: bool, ranks: Ranks, stopped: StopRequest, records: Records, sources: dict
) -> Run:
    """Builds every component, and loads the checkpoint or the backbone."""
    found = ranks.first(lambda: left_by(folder, records)) if resume else None
    if not found:
        cleared = os.environ.get("SSD_CACHES_CLEARED") == "1"  # said by base/trials.sh
        records.mlperf.init_start(platform=environment(ranks.device)["cpu"], cache_cleared=cleared)
    torch.manual_seed(config.seed)
    backend = load_backend(name, config.use)
    if not found:
        ranks.first(lambda: write_start(folder, Resolved(config, sources), name, backend.suppliers, ranks.device))
    if ranks.local_rank == 0:
        keep_config(folder, Resolved(config, sources), name)  # for --resume on a machine that does not share the first one's folder
    if config.bind_cores and ranks.device.type != "cpu":
        for rank, what in enumerate(ranks.gathered(bind(ranks.device, config.device_ids or range(config.devices)))):
            records.log(f"rank {rank}: {what}")
    index = AnnotationIndex.open(config.path("train_annotations"), records.log)
    categories = {"ids": index.category_ids.tolist(), "names": list(index.category_names)}
    model = backend.model(
        num_classes=len(index.category_ids) + 1,
        image_size=config.image_size,
        strides=config.strides,
        backbone=config.backbone,
        norm_group=ranks.neighbours(config.norm_ranks),
    )
    if found:
        checkpoint.load_model(model, found[1], found[0], config)
    elif config.checkpoint:
        path = checkpoint.found_in(config.checkpoint)
        left = checkpoint.carry_over(model, path, categories)
        taken = f"begins with the weights of {path}, its optimizer and step afresh"
        records.log(f"{taken}; random: {' '.join(left)}" if left else f"{taken}; all of them")
    elif config.backbone_path:
        load_backbone(model, config.backbone_path)
    model.to(ranks.device)
    optimizer = backend.optimizer(model.parameters(), momentum=config.momentum, weight_decay=config.weight_decay)
    step = backend.step(
        model=model,
        optimizer=optimizer,
        matcher=backend.matcher,
        loss=backend.loss,
        device=ranks.device,
        accumulation=config.gradient_accumulation,
        world_size=ranks.world_size,
        bucket_mb=config.gradient_bucket_mb,
        compression=config.gradient_compression,
    )
    if not found:
        records.mlperf.run_start()  # by MLPerf's rules the clock runs before any training image is read
    train_loader = backend.train_loader(
        annotation_file=config.path("train_annotations"),
        image_dir=config.path("train_images"),
        image_size=config.image_size,
        batch_size=config.batch_size,
        workers=config.workers,
        seed=config.seed,
        rank=ranks.rank,
        world_size=ranks.world_size,
        max_samples=config.max_samples,
        skip_bad_images=config.skip_bad_images,
    )
    images = int((index.first_box[1:] > index.first_box[:-1]).sum())
    state = Run(
        config, folder, ranks, stopped, records, backend, model, optimizer, step, train_loader,
        make_eval_loader(backend, config, ranks), images, categories,
        Sampler(backend.telemetry, config.telemetry_seconds, ranks.device, ranks.local_rank), Clock(ranks.device),
    )  # fmt: skip
    if hasattr(step, "clock"):
        step.clock = state.clock
    if state.clock.missing:
        records.log(f"how long steps and their parts take is not measured: {state.clock.missing}")
    if found:
        content = found[1]
        state.progress = Progress(**content["progress"])
        state.progress.resumed += 1
        optimizer.load_state_dict(content["optimizer"])
        step.load_state_dict(content["step"])
        if content["loaders"]:
            train_loader.load_state_dict(content["loaders"][ranks.rank])
        records.log(f"resumed from {found[0].name}: {state.progress.step} steps done")
    else:
        records.mlperf.hyperparameters(config, images, len(AnnotationIndex.open(config.path("val_annotations"), records.log)))
    if config.tensorboard:
        ranks.first(records.open_events)
    return state
