"""The reference's matching for many images at once in torch's operations: nothing in it waits for the device."""

import torch
from base.backends.reference.matcher import THRESHOLD
from torch import Tensor
from torch.nn import functional

from base.boxes import DefaultBoxes, encode, iou
from base.contracts import Targets

PAIRS = 1 << 24  # of boxes and default boxes that are compared at once: 20 of COCO's fullest images at 300×300, fewer of larger ones


def match(boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets:
    """Boxes float32 (N, M, 4) ltrb and labels int64 (N, M), 0 = padding → Targets; equal to `reference.matcher.match`, ties included."""
    if boxes.shape[1] == 0:
        boxes, labels = functional.pad(boxes, (0, 0, 0, 1)), functional.pad(labels, (0, 1))
    images = max(1, PAIRS // (boxes.shape[1] * len(default_boxes)))
    parts = [match_some(*some, default_boxes) for some in zip(boxes.split(images), labels.split(images), strict=True)]
    return Targets(*map(torch.cat, zip(*parts, strict=True)))


def match_some(boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets:
    """As `match`, for as many images as there is memory for, with M ≥ 1."""
    boxes, real = boxes.float(), labels > 0
    overlaps = iou(boxes, default_boxes.ltrb).masked_fill(~real[..., None], -1)  # (N, M, A)
    best_overlap, best_box = overlaps.max(1)
    best_default = default_boxes.mlperf_order[overlaps[..., default_boxes.mlperf_order].argmax(2)]  # (N, M)
    numbers = torch.arange(boxes.shape[1], device=boxes.device).expand_as(labels).masked_fill(~real, -1)
    taken = torch.full_like(best_box, -1).scatter_reduce(1, best_default, numbers, "amax")  # of two boxes the later one
    chosen = torch.where(taken >= 0, taken, best_box)
    positive = (taken >= 0) | (best_overlap > THRESHOLD)
    offsets = encode(boxes.gather(1, chosen[..., None].expand(-1, -1, 4)), default_boxes.xywh)
    return Targets(torch.where(positive[..., None], offsets, 0.0), torch.where(positive, labels.gather(1, chosen), 0))
