"""The reference's decoding on the device, for a whole batch: three Triton kernels and one selection; the host waits once, at the end."""

import math

import torch
import triton
import triton.language as tl
from base.backends.reference import decoder as reference
from torch import Tensor

from base.boxes import CENTRE_VARIANCE, SIZE_VARIANCE, DefaultBoxes
from base.contracts import Detections, Predictions

from .kernels import LIBRARY, on_kernels

BEST_A_CLASS = reference.BEST_A_CLASS
ROOM = 256 * 2**20  # bytes for candidates; a batch that may need more is decoded in groups of images, one after the other
TILE = 2048  # logits that one program holds
SEGMENT = 2048  # candidates of a class that one program looks at together
MOST, CENTRE, SIZE = tl.constexpr(BEST_A_CLASS), tl.constexpr(CENTRE_VARIANCE), tl.constexpr(SIZE_VARIANCE)

# A score and what comes first among equals, as one number: of two, the greater is the better. Scores are not negative, so that
# their bits are ordered as they are, and a number below 0 stands for nothing.
LAST = tl.constexpr(0x7FFFFFFF)  # number ^ LAST is LAST - number


def decode(
    predictions: Predictions,
    default_boxes: DefaultBoxes,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    max_detections: int = 200,
) -> list[Detections]:
    """Predictions of N images → N Detections in float32 on the predictions' device; equal to `reference.decoder.decode` but for rounding.

    Offsets and logits may be of any floating-point dtype and memory layout. On the CPU without Triton's interpreter the
    reference does it. Raises ValueError if the shapes or devices do not fit, or a threshold or limit is no sensible number.
    """
    offsets, logits = predictions.offsets.detach(), predictions.logits.detach()
    if logits.dim() != 3 or offsets.shape != (*logits.shape[:2], 4) or logits.shape[1] != len(default_boxes):
        shapes = f"{tuple(offsets.shape)} and {tuple(logits.shape)} for {len(default_boxes)} default boxes"
        raise ValueError(f"offsets must be (N, A, 4) and logits (N, A, C), and are {shapes}")
    if not offsets.is_floating_point() or not logits.is_floating_point():
        raise ValueError(f"offsets and logits must be floating-point numbers, and are {offsets.dtype} and {logits.dtype}")
    if elsewhere := {str(t.device) for t in (offsets, default_boxes.xywh) if t.device != logits.device}:
        raise ValueError(f"the logits are on {logits.device}, and offsets or default boxes on {elsewhere.pop()}")
    if logits.shape[2] < 1 or logits.shape[2] * BEST_A_CLASS >= 2**31 or logits.shape[1] >= 2**31:
        raise ValueError(f"there must be 1 to 10^7 classes and fewer than 2^31 default boxes, and logits are {tuple(logits.shape)}")
    if math.isnan(score_threshold) or math.isnan(iou_threshold):
        raise ValueError(f"score_threshold and iou_threshold must be numbers, and are {score_threshold} and {iou_threshold}")
    if max_detections < 0:
        raise ValueError(f"max_detections must not be negative, and is {max_detections}")
    if not on_kernels(logits):
        return reference.decode(predictions, default_boxes, score_threshold, iou_threshold, max_detections)
    limit = min(max_detections, (logits.shape[2] - 1) * BEST_A_CLASS)  # more cannot be found
    *found, counts = decode_op(offsets, logits, default_boxes.xywh.detach().float(), float(score_threshold), float(iou_threshold), limit)
    return [Detections(*(column[:count] for column in image)) for *image, count in zip(*found, counts.tolist(), strict=True)]


@torch.library.custom_op(f"{LIBRARY}::decode", mutates_args=())
def decode_op(
    offsets: Tensor, logits: Tensor, xywh: Tensor, score_threshold: float, iou_threshold: float, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """→ boxes float32 (N, D, 4), labels int64 (N, D), scores float32 (N, D), found int64 (N), for D = ``limit`` ≤ 200·(C - 1).

    Rows past an image's ``found`` are 0. No host sync, and shapes that depend on the arguments' shapes and ``limit`` alone.

    Floor: N·A·C logits, read once, over the memory's bandwidth; what follows looks at candidates only. Working memory:
    8·N·(C - 1)·A bytes, but no more than `ROOM` or one image's share (5.6 MB for 8732 default boxes and 81 classes), where
    every score may be a candidate; and 24·N·(C - 1)·min(D, 200) bytes for what is kept of each class.
    """
    (images, count, classes), device = logits.shape, logits.device
    foreground, most = classes - 1, min(limit, BEST_A_CLASS)
    if limit == 0 or images == 0 or count == 0:
        columns = torch.zeros(images, limit, 4, device=device), torch.zeros(images, limit, dtype=torch.long, device=device)
        return *columns, torch.zeros(images, limit, device=device), torch.zeros(images, dtype=torch.long, device=device)

    group = max(1, min(images, ROOM // (8 * foreground * count)))
    keys = torch.empty(group * foreground * count, dtype=torch.long, device=device)  # candidates of each image and class, in any order
    counts = torch.zeros(images, foreground, dtype=torch.int32, device=device)
    kept_keys = torch.full((images, foreground * most), -1, dtype=torch.long, device=device)
    kept_boxes = torch.empty(images, foreground * most, 4, device=device)
    width = triton.next_power_of_2(classes)
    rows = max(1, TILE // width)
    xywh = xywh.contiguous()
    for start in range(0, images, group):
        x, to = logits[start : start + group], offsets[start : start + group]
        here, some = counts[start : start + group], len(x)
        candidates[(some * triton.cdiv(count, rows),)](
            x, *x.stride(), keys, here, count, classes, score_threshold, rows, width, enable_fp_fusion=False
        )
        keep_best[(some * foreground,)](keys, here, count, SEGMENT, num_warps=8, enable_fp_fusion=False)
        into = kept_keys[start : start + group], kept_boxes[start : start + group]
        given = keys, here, to, *to.stride(), xywh, *into, count, foreground, most, iou_threshold
        # Without fused multiply-add boxes and overlaps are the reference's, so that those on the threshold fall alike.
        suppress[(some * foreground,)](*given, triton.next_power_of_2(BEST_A_CLASS), num_warps=1, enable_fp_fusion=False)

    best = kept_keys.topk(limit).values  # no two are equal but those of nothing
    nothing = best < 0
    place = (best & LAST.value) ^ LAST.value
    boxes = kept_boxes.gather(1, place[..., None].expand(-1, -1, 4)).masked_fill_(nothing[..., None], 0)
    scores = (best >> 32).int().view(torch.float32).masked_fill_(nothing, 0)
    return boxes, (place // most + 1).masked_fill_(nothing, 0), scores, (~nothing).sum(1)


@decode_op.register_fake
def _(offsets, logits, xywh, score_threshold, iou_threshold, limit):
    images = logits.shape[0]
    floats, whole = ({"dtype": dtype} for dtype in (torch.float32, torch.long))
    columns = logits.new_empty(images, limit, **whole), logits.new_empty(images, limit, **floats), logits.new_empty(images, **whole)
    return logits.new_empty(images, limit, 4, **floats), *columns


@triton.jit
def ranked(score, number):
    """A score and the number of what has it as one int64: the greater score, then the smaller number, is the greater."""
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (number ^ LAST).to(tl.int64)


@triton.jit
def candidates(
    logits, image_stride, row_stride, class_stride, keys, counts, count, classes, score_threshold, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Softmax of some default boxes of an image; scores above the threshold are appended to their class's candidates.

    keys (images, C - 1, A) in any order, counts (images, C - 1) how many. A class has at most one candidate a default box: there is
    always room. Floor: the logits' bytes, read once, over the memory's bandwidth.
    """
    blocks = tl.cdiv(count, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < count)[:, None] & (column < classes)[None, :]
    place = image * image_stride + row.to(tl.int64)[:, None] * row_stride + column.to(tl.int64)[None, :] * class_stride
    x = tl.load(logits + place, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.where(row < count, tl.max(x, 1), 0.0)
    powers = tl.exp(x - top[:, None])
    total = tl.where(row < count, tl.sum(powers, 1), 1.0)
    scores = tl.div_rn(powers, total[:, None])
    found = (inside & (column > 0)[None, :] & (scores > score_threshold)).to(tl.int32)
    of_class = tl.sum(found, 0)
    if tl.max(of_class, 0) > 0:  # mostly there are none
        line = image * (classes - 1) + column - 1
        first = tl.atomic_add(counts + line, of_class, mask=of_class > 0, sem="relaxed")
        slot = first[None, :] + tl.cumsum(found, 0) - found
        tl.store(keys + (line * count)[None, :] + slot, ranked(scores, row[:, None]), mask=found > 0)


@triton.jit
def keep_best(keys, counts, count, SEGMENT: tl.constexpr):
    """One image's class: of more than 200 candidates the best 200 are moved to the front, in any order.

    The 200th best is found bit by bit: 62 passes over candidates in the cache, and none where there are 200 or fewer.
    """
    line = tl.program_id(0).to(tl.int64)
    found = tl.load(counts + line)
    if found > MOST:
        keys += line * count
        number = tl.arange(0, SEGMENT)
        least = tl.full((), 0, tl.int64)  # the greatest key that at least 200 reach
        for step in range(62):  # scores are at most 1 and a little: their bits are fewer than 30, and those of numbers 31
            wanted = least | (tl.full((), 1, tl.int64) << (61 - step))
            reached = 0
            for start in range(0, found, SEGMENT):
                some = tl.load(keys + start + number, mask=start + number < found, other=-1)
                reached += tl.sum((some >= wanted).to(tl.int32), 0)
            least = tl.where(reached >= MOST, wanted, least)
        moved = 0
        for start in range(0, found, SEGMENT):
            some = tl.load(keys + start + number, mask=start + number < found, other=-1)
            good = (some >= least).to(tl.int32)
            # Never behind where it was: what is overwritten has been read, since the sum before it took all of it.
            tl.store(keys + moved + tl.cumsum(good, 0) - 1, some, mask=good > 0)
            moved += tl.sum(good, 0)
        tl.store(counts + line, moved)


@triton.jit
def suppress(
    keys, counts, offsets, image_stride, row_stride, value_stride, xywh, kept_keys, kept_boxes, count, foreground, most, iou_threshold,
    BLOCK: tl.constexpr
):  # fmt: skip
    """One image's class: candidates by falling score, each taking away the later ones that it overlaps too much.

    They stay in registers, unsorted: each round takes the best that is left, so that there are as many rounds as boxes are kept,
    at most ``most``. Floor: the latency of these rounds; the bytes are those of the candidates.
    """
    line = tl.program_id(0).to(tl.int64)
    found = tl.load(counts + line)
    if found > 0:
        image, label = line // foreground, (line % foreground).to(tl.int32)
        number = tl.arange(0, BLOCK)
        left = tl.load(keys + line * count + number, mask=number < found, other=-1)
        row = tl.where(number < found, (left & LAST) ^ LAST, 0)
        # base/boxes.py: decode, iou
        offset = offsets + image * image_stride + row * row_stride
        x = tl.load(offset, mask=number < found, other=0.0).to(tl.float32)
        y = tl.load(offset + value_stride, mask=number < found, other=0.0).to(tl.float32)
        w = tl.load(offset + 2 * value_stride, mask=number < found, other=0.0).to(tl.float32)
        h = tl.load(offset + 3 * value_stride, mask=number < found, other=0.0).to(tl.float32)
        wide = tl.load(xywh + 4 * row + 2)
        high = tl.load(xywh + 4 * row + 3)
        x = x * CENTRE * wide + tl.load(xywh + 4 * row)
        y = y * CENTRE * high + tl.load(xywh + 4 * row + 1)
        w = tl.exp(w * SIZE) * wide / 2
        h = tl.exp(h * SIZE) * high / 2
        x0, y0, x1, y1 = x - w, y - h, x + w, y + h
        area = (x1 - x0) * (y1 - y0)

        taken = 0
        best = tl.max(left, 0)
        while (best >= 0) & (taken < most):
            itself = left == best
            a = tl.sum(tl.where(itself, x0, 0.0), 0)
            b = tl.sum(tl.where(itself, y0, 0.0), 0)
            c = tl.sum(tl.where(itself, x1, 0.0), 0)
            d = tl.sum(tl.where(itself, y1, 0.0), 0)
            place = label * most + taken
            tl.store(kept_keys + image * foreground * most + place, (best >> 32 << 32) | (place ^ LAST).to(tl.int64))
            to = kept_boxes + (image * foreground * most + place) * 4
            tl.store(to, a)
            tl.store(to + 1, b)
            tl.store(to + 2, c)
            tl.store(to + 3, d)
            shared = tl.maximum(tl.minimum(x1, c) - tl.maximum(x0, a), 0.0) * tl.maximum(tl.minimum(y1, d) - tl.maximum(y0, b), 0.0)
            overlap = tl.div_rn(shared, area + (c - a) * (d - b) - shared)
            left = tl.where(itself | (overlap >= iou_threshold), -1, left)
            taken += 1
            best = tl.max(left, 0)
