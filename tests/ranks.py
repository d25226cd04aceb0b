"""One of several processes that train together, for test_ranks.py and test_hosts.py."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from base import distributed
from base.backend import load_backend
from base.contracts import Batch
from base.distributed import Ranks

CLASSES, IMAGES, STEPS = 5, 8, 4
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


def train(rank: int, world_size: int, folder: str, cases: dict[str, dict]) -> None:
    """Trains on its part of every batch, once for each case; leaves name → (losses, state of the model) in folder/<rank>.pt."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    found = {}
    for name, case in cases.items():
        options = dict(case)
        backend = load_backend(options.pop("backend", "reference"))
        group = Ranks(rank, world_size, torch.device("cpu")).neighbours(options.pop("norm_ranks", 0))
        torch.manual_seed(7)
        model = backend.model(num_classes=CLASSES, image_size=(96, 96), strides=(1,) * 6, backbone="resnet18", norm_group=group)
        optimizer = backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
        parts = {"model": model, "optimizer": optimizer, "matcher": backend.matcher, "loss": backend.loss, "device": "cpu"}
        step = backend.step(**parts, world_size=world_size, **options)
        losses = [step(Batch(*(t.chunk(world_size)[rank] for t in batch)), RATE).item() for batch in batches()]
        found[name] = torch.tensor(losses), model.state_dict()
    torch.save(found, Path(folder, f"{rank}.pt"))
    if world_size > 1:
        dist.destroy_process_group()


def lose_the_last(rank: int, world_size: int, port: int, folder: str) -> None:
    """Ranks of a host each add up numbers until the last of them ends; the others leave what they say of it in folder/<rank>.txt."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["SSD_HOSTS"] = "a b c"
    here = distributed.join("cpu", "gloo", 40)
    try:
        for turn in range(10**9):
            if turn == 20 and rank == world_size - 1:
                os._exit(0)
            here.sums([1.0])
    except RuntimeError as error:
        Path(folder, f"{rank}.txt").write_text(str(distributed.lost(error, here, 40)))
