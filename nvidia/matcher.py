"""The reference's matching as two Triton kernels, for a whole batch on its device."""

import torch
import triton
import triton.language as tl
from base.backends.reference import matcher as reference
from torch import Tensor

from base.boxes import CENTRE_VARIANCE, SIZE_VARIANCE, DefaultBoxes
from base.contracts import Targets

from .kernels import LIBRARY, block, on_kernels

BLOCK = 256  # default boxes of one program


def match(boxes: Tensor, labels: Tensor, default_boxes: DefaultBoxes) -> Targets:
    """Boxes float32 (N, M, 4) ltrb and labels int64 (N, M), 0 = padding → Targets for the A default boxes.

    Equal to `reference.matcher.match`, ties included. No host sync, and shapes that depend on N, M and A alone. On the CPU
    without Triton's interpreter the reference does it. Raises ValueError if the shapes do not fit.
    """
    if boxes.dim() != 3 or boxes.shape[2] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(f"boxes must be (N, M, 4) and labels (N, M), and are {tuple(boxes.shape)} and {tuple(labels.shape)}")
    if labels.is_floating_point():
        raise ValueError(f"labels must be whole numbers, and are {labels.dtype}")
    if elsewhere := {str(t.device) for t in (labels, default_boxes.ltrb) if t.device != boxes.device}:
        raise ValueError(f"the boxes are on {boxes.device}, and labels or default boxes on {elsewhere.pop()}")
    if not on_kernels(boxes):
        return reference.match(boxes, labels, default_boxes)
    return Targets(*match_op(boxes.float(), labels.long(), default_boxes.xywh, default_boxes.ltrb, default_boxes.mlperf_rank))


@torch.library.custom_op(f"{LIBRARY}::match", mutates_args=())
def match_op(boxes: Tensor, labels: Tensor, xywh: Tensor, ltrb: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """→ offsets float32 (N, A, 4), labels int64 (N, A).

    Floor: 24 bytes for each default box and image, which it writes, over the memory's bandwidth; default boxes and truth stay
    in the cache. The overlaps are computed in both kernels: fewer bytes than keeping them.
    """
    boxes, labels = boxes.contiguous(), labels.contiguous()
    (images, most), count = labels.shape, len(xywh)
    offsets = torch.empty(images, count, 4, device=boxes.device)
    classes = torch.empty(images, count, dtype=torch.long, device=boxes.device)
    best = torch.full((images, max(most, 1)), -1, dtype=torch.long, device=boxes.device)
    if images == 0:
        return offsets, classes
    size = block(boxes, BLOCK)
    grid = (triton.cdiv(count, size), images)  # the second may be 65,535 at most
    # Without fused multiply-add an overlap has the reference's bits, so that ties fall alike.
    given = boxes, labels, ltrb.contiguous()
    constants = {"BOXES": triton.next_power_of_2(max(most, 1)), "BLOCK": size, "enable_fp_fusion": False}
    find_best[grid](*given, rank, best, most, count, **constants)
    assign[grid](*given, xywh.contiguous(), rank, best, offsets, classes, most, count, **constants)
    return offsets, classes


@match_op.register_fake
def _(boxes, labels, xywh, ltrb, rank):
    shape = len(boxes), len(xywh)
    return boxes.new_empty(*shape, 4, dtype=torch.float32), boxes.new_empty(shape, dtype=torch.long)


@triton.jit
def overlaps(left, top, right, bottom, defaults, number, inside):
    """IoU of one box with a block of default boxes; the operations of `base.boxes.iou` in their order."""
    a = tl.load(defaults + 4 * number, mask=inside, other=0.0)
    b = tl.load(defaults + 4 * number + 1, mask=inside, other=0.0)
    c = tl.load(defaults + 4 * number + 2, mask=inside, other=0.0)
    d = tl.load(defaults + 4 * number + 3, mask=inside, other=0.0)
    wide = tl.maximum(tl.minimum(right, c) - tl.maximum(left, a), 0.0)
    high = tl.maximum(tl.minimum(bottom, d) - tl.maximum(top, b), 0.0)
    shared = wide * high
    return tl.div_rn(shared, (right - left) * (bottom - top) + (c - a) * (d - b) - shared)


@triton.jit
def last_of(labels, most, BOXES: tl.constexpr):
    """How many of an image's places for boxes one has to look at: what follows is padding."""
    number = tl.arange(0, BOXES)
    return tl.max(tl.where(tl.load(labels + number, mask=number < most, other=0) > 0, number + 1, 0), 0)


@triton.jit
def find_best(boxes, labels, defaults, rank, best, most, count, BOXES: tl.constexpr, BLOCK: tl.constexpr):
    """For each box the highest overlap, and the lowest rank with it: together one number, of which the largest wins."""
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    order = tl.load(rank + number, mask=inside, other=0)
    for m in range(last_of(labels + image * most, most, BOXES)):
        here = image * most + m
        if tl.load(labels + here) > 0:
            box = boxes + 4 * here
            overlap = overlaps(tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3), defaults, number, inside)
            key = (overlap.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - order)
            tl.atomic_max(best + here, tl.max(tl.where(inside, key, -1), 0))


@triton.jit
def assign(boxes, labels, defaults, xywh, rank, best, offsets, classes, most, count, BOXES: tl.constexpr, BLOCK: tl.constexpr):
    """Each default box takes the box that overlaps it most, if by more than half, or the last that it is the best for."""
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < count
    order = tl.load(rank + number, mask=inside, other=-1)
    most_overlap = tl.full((BLOCK,), 0.5, tl.float32)
    chosen = tl.full((BLOCK,), -1, tl.int32)
    forced = tl.full((BLOCK,), -1, tl.int32)
    for m in range(last_of(labels + image * most, most, BOXES)):
        here = image * most + m
        if tl.load(labels + here) > 0:
            box = boxes + 4 * here
            overlap = overlaps(tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3), defaults, number, inside)
            chosen = tl.where(overlap > most_overlap, m, chosen)
            most_overlap = tl.maximum(overlap, most_overlap)
            owner = 0x7FFFFFFF - (tl.load(best + here) & 0x7FFFFFFF)
            forced = tl.where(order == owner, m, forced)
    chosen = tl.where(forced >= 0, forced, chosen)
    positive = inside & (chosen >= 0)
    here = image * most + chosen
    left = tl.load(boxes + 4 * here, mask=positive, other=0.0)
    top = tl.load(boxes + 4 * here + 1, mask=positive, other=0.0)
    right = tl.load(boxes + 4 * here + 2, mask=positive, other=1.0)
    bottom = tl.load(boxes + 4 * here + 3, mask=positive, other=1.0)
    x = tl.load(xywh + 4 * number, mask=inside, other=0.5)
    y = tl.load(xywh + 4 * number + 1, mask=inside, other=0.5)
    w = tl.load(xywh + 4 * number + 2, mask=inside, other=1.0)
    h = tl.load(xywh + 4 * number + 3, mask=inside, other=1.0)
    to = offsets + 4 * (image * count + number)
    centre_variance: tl.constexpr = CENTRE
    size_variance: tl.constexpr = SIZE
    tl.store(to, tl.where(positive, ((left + right) / 2 - x) / w / centre_variance, 0.0), mask=inside)
    tl.store(to + 1, tl.where(positive, ((top + bottom) / 2 - y) / h / centre_variance, 0.0), mask=inside)
    tl.store(to + 2, tl.where(positive, tl.log((right - left) / w) / size_variance, 0.0), mask=inside)
    tl.store(to + 3, tl.where(positive, tl.log((bottom - top) / h) / size_variance, 0.0), mask=inside)
    tl.store(classes + image * count + number, tl.load(labels + here, mask=positive, other=0), mask=inside)


CENTRE, SIZE = tl.constexpr(CENTRE_VARIANCE), tl.constexpr(SIZE_VARIANCE)
