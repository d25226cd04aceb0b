"""One of several processes that train or evaluate together, for test_ranks.py and test_hosts.py."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from base import reach
from base.backend import Backend, load_backend
from base.config import Config
from base.contracts import Batch
from base.distributed import Ranks
from base.evaluate import detect, make_eval_loader

CLASSES, IMAGES, STEPS = 6, 8, 4
FOLLOWED, RATE_AFTER = 48, 1e-4  # pixels and rate of `follow`
RATE = 3e-5  # as in a warm-up: at a full rate, one bit in the weights grows thirtyfold with every step from random weights


def batches() -> list[Batch]:
    """Global batches of random images, one box each at least."""
    random = torch.Generator().manual_seed(3)
    found = []
    for _ in range(STEPS):
        corner = torch.rand(IMAGES, 3, 2, generator=random) * 0.6
        boxes = torch.cat([corner, corner + 0.1 + torch.rand(IMAGES, 3, 2, generator=random) * 0.3], -1)
        labels = torch.randint(1, CLASSES, (IMAGES, 3), generator=random)
        labels[:, 1:] *= torch.randint(0, 2, (IMAGES, 2), generator=random)
        boxes[labels == 0] = 0
        images = torch.randint(0, 256, (IMAGES, 96, 96, 3), dtype=torch.uint8, generator=random)
        found.append(Batch(images, boxes, labels, torch.arange(IMAGES), torch.full((IMAGES, 2), 96)))
    return found


def on(world_size: int, folder: Path, work: Callable, *arguments) -> list:
    """What ``work(ranks, *arguments)`` returns on each of ``world_size`` processes; all of them come from one that has imported torch."""
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "torchvision"])
    torch.multiprocessing.start_processes(rank_main, (world_size, str(folder), work, arguments), nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def rank_main(rank: int, world_size: int, folder: str, work: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(Ranks(rank, world_size, torch.device("cpu")), *arguments), Path(folder, f"{rank}.pt"))
    if world_size > 1:
        dist.destroy_process_group()


def built(backend: Backend, ranks: Ranks, norm_ranks: int, side: int, **options):
    """A step of a small detector, the same on every rank and in every process, and its model."""
    torch.manual_seed(7)
    group = ranks.neighbours(norm_ranks)
    model = backend.model(num_classes=CLASSES, image_size=(side, side), strides=(1,) * 6, backbone="resnet18", norm_group=group)
    optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    parts = {"model": model, "optimizer": optimizer, "matcher": backend.matcher, "loss": backend.loss, "device": "cpu"}
    return backend.step(**parts, world_size=ranks.world_size, **options), model


def train(ranks: Ranks, cases: dict[str, dict]) -> dict[str, tuple]:
    """Trains on its part of every batch, once for each case: name → (losses, state of the model)."""
    found = {}
    for name, case in cases.items():
        options = {"backend": "reference", "use": {}, "steps": STEPS, "side": 96, "norm_ranks": 0, **case}
        backend, side, count = load_backend(options.pop("backend"), options.pop("use")), options.pop("side"), options.pop("steps")
        step, model = built(backend, ranks, options.pop("norm_ranks"), side, **options)
        given = [batch._replace(images=batch.images[:, :: 96 // side, :: 96 // side]) for batch in batches()[:count]]
        losses = [step(Batch(*(t.chunk(ranks.world_size)[ranks.rank] for t in batch)), RATE).item() for batch in given]
        found[name] = torch.tensor(losses), model.state_dict()
    return found


def steps(ranks: Ranks, backend: Backend, data: Path, weights: Path | None, rates: list[float]) -> tuple[list[float], dict]:
    """Trains with a rate for each step on global batches of 16 images from the backend's loader: → losses, state of the model."""
    step, model = built(backend, ranks, 0, FOLLOWED)
    if weights:
        model.load_state_dict(torch.load(weights))
    loader = backend.train_loader(
        annotation_file=data / "annotations" / "instances_train2017.json",
        image_dir=data / "train2017",
        image_size=(FOLLOWED, FOLLOWED),
        batch_size=16 // ranks.world_size,
        workers=0,
        seed=1,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    losses: list[float] = []
    while len(losses) < len(rates):
        loader.set_epoch(len(losses) // len(loader))
        losses += [step(batch, rate).item() for batch, rate in zip(loader, rates[len(losses) :], strict=False)]
    return losses, model.state_dict()


def follow(ranks: Ranks, names: list[str], data: Path, weights: Path) -> dict[str, list[float]]:
    """Backend → the losses of 20 float32 steps from ``weights``, which are trained a little first if they are not there."""
    if not weights.exists():
        rates = [0.01 * min(1, step / 20) for step in range(40)]
        torch.save(steps(ranks, load_backend("reference"), data, None, rates)[1], weights)
    return {name: steps(ranks, load_backend(name, {"step": "reference"}), data, weights, [RATE_AFTER] * 20)[0] for name in names}


def evaluate(ranks: Ranks, names: list[str], folders: dict[int, Path]) -> dict[tuple[str, int], dict]:
    """(backend, images) → what `base.evaluate.detect` gathers of a data set of so many images."""
    found = {}
    for name in names:
        backend = load_backend(name)
        step, model = built(backend, ranks, 1, FOLLOWED)
        for count, folder in folders.items():  # an image at a time, so that each is computed the same on any rank
            config = Config(data_dir=str(folder), image_size=(FOLLOWED, FOLLOWED), eval_batch_size=1, workers=0, max_detections=20)
            loader = make_eval_loader(backend, config, ranks)
            found[name, count], _ = detect(backend, config, ranks, step, model.default_boxes, loader, lambda: False)
    return found
def lose_the_last(rank: int, world_size: int, port: int, folder: str) -> None:
    """Ranks of a host each add up numbers until the last of them ends; the others leave what they say of it in folder/<rank>.txt."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SSD_HOSTS"] = "a b c"
    here = reach.join("cpu", "gloo", 40)
    try:
        for turn in range(10**9):
            if turn == 20 and rank == world_size - 1:
                os._exit(0)
            here.sums([1.0])
    except RuntimeError as error:
        Path(folder, f"{rank}.txt").write_text(reach.lost(error, here, 40)[1])
