"""The benchmark's model and a truth for it: all that a GPU's bench needs, where little more than torch is installed."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from base.backend import load_backend

CLASSES, SIZE, STRIDES = 81, (300, 300), (1, 1, 2, 2, 2, 1)
SSD300 = {"num_classes": CLASSES, "image_size": SIZE, "strides": STRIDES, "backbone": "resnet34"}


def truth(images: int, boxes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random boxes (N, M, 4) ltrb and labels (N, M) each time."""
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(images, boxes, 2, generator=generator) * 0.8
    size = 0.02 + torch.rand(images, boxes, 2, generator=generator) * 0.18
    return torch.cat([corner, corner + size], -1), torch.randint(1, CLASSES, (images, boxes), generator=generator)


def gflop(model: dict) -> float:
    """Operations of an image's forward and backward pass through the reference's model, in 1e9."""
    ssd = load_backend("reference").model(**model).to("meta")
    with FlopCounterMode(display=False) as counter:
        found = ssd(torch.empty(1, 3, *model["image_size"], device="meta"))
        (found.offsets.sum() + found.logits.sum()).backward()
    return counter.get_total_flops() / 1e9
