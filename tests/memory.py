"""What a backend's parts take at most: ``python -m tests.memory BACKEND`` prints {part: [bytes at a size, at four times as many pixels]}.

Bytes are those above what was there before.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from base.backends.reference.model import feature_sizes

from base.backend import load_backend
from base.boxes import default_boxes
from base.contracts import Batch
from conformance.loaders import pictures
from conformance.parts import CLASSES, Kit, loss_case, predictions_of, random_truth, with_slopes
from tests.conftest import DEVICE

SIDES = (600, 1200)  # of the loader's samples and of what the default boxes are for
STEP_SIDES = (256, 512)  # of the images that the model trains on
STRIDES = (1, 1, 2, 2, 1, 1)
IMAGES = 4


def peak(work: Callable[[], object]) -> int:
    """Bytes while ``work`` is done: on a CPU of a process of its own with all that it holds; else of the device's allocator."""
    if DEVICE.type != "cpu":
        memory = torch.get_device_module(DEVICE)
        memory.reset_peak_memory_stats()
        work()
        return memory.max_memory_allocated()
    if (child := os.fork()) == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"what was measured failed ({status})")
    return usage.ru_maxrss * 1024


def parts(kit: Kit, side: int) -> dict[str, Callable[[], object]]:
    """Calls of loader, matcher, loss and decoder at a size; inputs are made within them."""
    backend, rng = kit.backend, kit.rng()
    defaults = default_boxes((side, side), feature_sizes((side, side), STRIDES)).to(kit.device)
    given = {**pictures(kit), "image_size": (side, side), "batch_size": IMAGES, "workers": 0, "seed": 1}
    return {
        "train_loader": lambda: next(iter(backend.train_loader(**given))),
        "matcher": lambda: backend.matcher(*map(kit.on, random_truth(rng, IMAGES, 50)), defaults),
        "loss": lambda: with_slopes(backend.loss, *loss_case(kit, rng, 0.002, IMAGES, len(defaults), torch.float32)),
        "decoder": lambda: backend.decoder(predictions_of(rng, kit, defaults, torch.float32, IMAGES), defaults),
    }


def training(kit: Kit, side: int) -> None:
    """One step on one image."""
    model = kit.backend.model(num_classes=CLASSES, image_size=(side, side), strides=STRIDES, backbone="resnet18").to(kit.device)
    optimizer = kit.backend.optimizer(model.parameters(), momentum=0.9, weight_decay=5e-4)
    step = kit.backend.step(model=model, optimizer=optimizer, matcher=kit.backend.matcher, loss=kit.backend.loss, device=kit.device)
    boxes, labels = map(torch.from_numpy, random_truth(kit.rng(), 1, 7))
    images = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    step(Batch(images, boxes.float(), labels, torch.tensor([1]), torch.tensor([[side, side]])), 1e-3)


def main(name: str) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        kit = Kit(load_backend(name), load_backend("reference"), DEVICE, 1, Path(scratch), {})
        calls = [parts(kit, side) for side in SIDES]
        works = {part: [call[part] for call in calls] for part in calls[0]} | {"step": [partial(training, kit, side) for side in STEP_SIDES]}
        before = peak(lambda: None)
        print(json.dumps({part: [peak(work) - before for work in pair] for part, pair in works.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
