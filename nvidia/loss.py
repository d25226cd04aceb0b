"""The multibox loss as three Triton kernels: hard negatives are selected on the device, without sorting and without a host sync."""

import torch
import triton
import triton.language as tl
from base.backends.reference import loss as reference
from torch import Tensor

from base.contracts import Predictions, Targets

from .kernels import LIBRARY, block, on_kernels

ROWS = 32  # default boxes whose logits one program holds
FEW = 8  # of which it may be that none takes part
HELD = 4096  # logits that one warp holds: of COCO's classes a whole program, whose sums then need no barrier
WHOLE = 16384  # default boxes of an image that one program looks at together
RATIO = tl.constexpr(reference.NEGATIVES_PER_POSITIVE)


def multibox_loss(predictions: Predictions, targets: Targets) -> Tensor:
    """Predictions, Targets of N images → float32 scalar; equal to `reference.loss.multibox_loss`.

    Logits and offsets may be float32, bfloat16 or float16; their gradients come in the same dtype. On the CPU without
    Triton's interpreter the reference does it. Raises ValueError if the shapes do not fit.
    """
    offsets, logits = predictions
    fits = offsets.shape == targets.offsets.shape == (*logits.shape[:2], 4) and targets.labels.shape == logits.shape[:2]
    if logits.dim() != 3 or not fits:
        shapes = ", ".join(str(tuple(t.shape)) for t in (*predictions, *targets))
        raise ValueError(f"the loss needs offsets (N, A, 4), logits (N, A, C) and targets (N, A, 4), (N, A), and got {shapes}")
    if not on_kernels(logits):
        return reference.multibox_loss(predictions, targets)
    losses, _, _ = multibox_op(offsets, logits, targets.offsets.float(), targets.labels.long())
    return losses.mean()


def warps(logits: int) -> int:
    """Of a program that holds so many."""
    return max(1, min(16, logits // HELD))


@torch.library.custom_op(f"{LIBRARY}::multibox", mutates_args=())
def multibox_op(offsets: Tensor, logits: Tensor, wanted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ each image's loss float32 (N), which default boxes' cross-entropies count uint8 (N, A), positives int32 (N).

    Floor: N·A·C logits, read once, over the memory's bandwidth.
    """
    logits, offsets, wanted, labels = (t.contiguous() for t in (logits, offsets, wanted, labels))
    images, count, classes = logits.shape
    entropies = torch.empty(images, count, device=logits.device)
    losses = torch.empty(images, device=logits.device)
    chosen = torch.empty(images, count, dtype=torch.uint8, device=logits.device)
    positives = torch.empty(images, dtype=torch.int32, device=logits.device)
    if images:
        rows, some, width = images * count, block(logits, ROWS), triton.next_power_of_2(classes)
        cross_entropies[(triton.cdiv(rows, some),)](logits, labels, entropies, rows, classes, some, width, num_warps=warps(ROWS * width))
        whole = min(triton.next_power_of_2(count), WHOLE)
        given = offsets, wanted, labels, entropies, losses, chosen, positives
        select[(images,)](*given, count, whole, count <= whole, num_warps=max(1, min(32, whole // 256)))
    return losses, chosen, positives


@multibox_op.register_fake
def _(offsets, logits, wanted, labels):
    images, count, _ = logits.shape
    one = logits.new_empty(images, dtype=torch.float32)
    return one, logits.new_empty(images, count, dtype=torch.uint8), logits.new_empty(images, dtype=torch.int32)


@torch.library.custom_op(f"{LIBRARY}::multibox_backward", mutates_args=())
def multibox_backward(
    slopes: Tensor, offsets: Tensor, logits: Tensor, wanted: Tensor, labels: Tensor, chosen: Tensor, positives: Tensor
) -> tuple[Tensor, Tensor]:
    """→ gradients of offsets and logits, in their dtype. Floor: N·A·C gradients, written once: few logits are read again."""
    logits, offsets, wanted, labels, slopes = (t.contiguous() for t in (logits, offsets, wanted, labels, slopes))
    images, count, classes = logits.shape
    to_offsets, to_logits = torch.zeros_like(offsets), torch.zeros_like(logits)  # few rows are written again
    if images:
        given = slopes, offsets, logits, wanted, labels, chosen, positives, to_offsets, to_logits
        some = block(logits, FEW)
        width = triton.next_power_of_2(classes)
        sizes = images * count, count, classes, some, width
        gradients[(triton.cdiv(images * count, some),)](*given, *sizes, num_warps=2 * warps(FEW * width))
    return to_offsets, to_logits


@multibox_backward.register_fake
def _(slopes, offsets, logits, wanted, labels, chosen, positives):
    return torch.empty_like(offsets, memory_format=torch.contiguous_format), torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep(ctx, inputs, output):
    _, chosen, positives = output
    ctx.mark_non_differentiable(chosen, positives)
    ctx.save_for_backward(*inputs, chosen, positives)


def _differentiate(ctx, slopes, *_):
    to_offsets, to_logits = multibox_backward(slopes, *ctx.saved_tensors)
    return to_offsets, to_logits, None, None


multibox_op.register_autograd(_differentiate, setup_context=_keep)


@triton.jit
def cross_entropies(logits, labels, entropies, rows, classes, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Each row's cross-entropy with its label."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    inside = first + row < rows
    logits += first * classes
    x = tl.load(logits + row[:, None] * classes + column[None, :], mask=inside[:, None] & (column[None, :] < classes), other=float("-inf"))
    x = x.to(tl.float32)
    label = tl.load(labels + first + row, mask=inside, other=0).to(tl.int32)
    shift = tl.where(inside, tl.max(x, 1), 0.0)
    total = tl.where(inside, tl.sum(tl.exp(x - shift[:, None]), 1), 1.0)
    own = tl.load(logits + row * classes + label, mask=inside & (label >= 0) & (label < classes), other=0.0).to(tl.float32)
    tl.store(entropies + first + row, tl.log(total) + shift - own, mask=inside)


@triton.jit
def hardness(entropies, labels, number, inside):
    """Cross-entropies of negatives in an order of whole numbers, what is not a number highest; -1 for all others."""
    entropy = tl.load(entropies + number, mask=inside, other=0.0)
    label = tl.load(labels + number, mask=inside, other=1)
    key = tl.where(entropy < 0, 0, entropy.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    return tl.where(label == 0, key, -1)


@triton.jit
def how_many(least, keys, entropies, labels, count, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Negatives that are at least so hard. ``TOGETHER``: one block holds all default boxes, and their ``keys`` are in registers."""
    if TOGETHER:
        reached = tl.sum((keys >= least).to(tl.int32), 0)
    else:
        reached = 0
        for start in range(0, count, BLOCK):
            number = start + tl.arange(0, BLOCK)
            reached += tl.sum((hardness(entropies, labels, number, number < count) >= least).to(tl.int32), 0)
    return reached


@triton.jit
def select(offsets, wanted, labels, entropies, losses, chosen, positives, count, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """One image: its positives' losses, and the hardest negatives', three for each positive, found by bisecting their bits.

    Of negatives as hard as the last one taken, the first are taken. Everything it reads again comes from the cache.
    """
    image = tl.program_id(0).to(tl.int64)
    offsets, wanted = offsets + image * count * 4, wanted + image * count * 4
    labels, entropies, chosen = labels + image * count, entropies + image * count, chosen + image * count

    positive_count = 0
    total = 0.0
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < count
        positive = inside & (tl.load(labels + number, mask=inside, other=0) > 0)
        positive_count += tl.sum(positive.to(tl.int32), 0)
        loss = tl.load(entropies + number, mask=positive, other=0.0)
        for k in range(4):
            x = tl.load(offsets + 4 * number + k, mask=positive, other=0.0).to(tl.float32)
            apart = tl.abs(x - tl.load(wanted + 4 * number + k, mask=positive, other=0.0))
            loss += tl.where(apart < 1, 0.5 * apart * apart, apart - 0.5)
        total += tl.sum(tl.where(positive, loss, 0.0), 0)

    wish = tl.minimum(RATIO * positive_count, count - positive_count)
    first_block = tl.arange(0, BLOCK)
    keys = hardness(entropies, labels, first_block, first_block < count)
    least = 0  # the largest number that at least `wish` negatives reach
    for step in range(31):
        candidate = least | (1 << (30 - step))
        least = tl.where(how_many(candidate, keys, entropies, labels, count, BLOCK, TOGETHER) >= wish, candidate, least)
    above = how_many(least + 1, keys, entropies, labels, count, BLOCK, TOGETHER)

    equal_before = 0
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        inside = number < count
        key = hardness(entropies, labels, number, inside)
        equal = (key == least).to(tl.int32)
        first = equal_before + tl.cumsum(equal, 0) <= wish - above
        negative = (wish > 0) & ((key > least) | ((equal > 0) & first))
        total += tl.sum(tl.where(negative, tl.load(entropies + number, mask=inside, other=0.0), 0.0), 0)
        counts = negative | (inside & (tl.load(labels + number, mask=inside, other=0) > 0))
        tl.store(chosen + number, counts.to(tl.uint8), mask=inside)
        equal_before += tl.sum(equal, 0)
    tl.store(positives + image, positive_count)
    tl.store(losses + image, tl.where(positive_count > 0, total / tl.maximum(positive_count, 1), 0.0))


@triton.jit
def gradients(
    slopes, offsets, logits, wanted, labels, chosen, positives, to_offsets, to_logits, rows, count, classes,
    ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Gradients of the rows that take part. All others are zero already, and of them nothing but that is read."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    inside = first + row < rows
    takes_part = inside & (tl.load(chosen + first + row, mask=inside, other=0) > 0)
    if tl.max(takes_part.to(tl.int32), 0) > 0:
        image = (first + row) // count
        found = tl.load(positives + image, mask=takes_part, other=0)
        takes_part = takes_part & (found > 0)
        share = tl.load(slopes + image, mask=takes_part, other=0.0) / tl.maximum(found, 1)
        label = tl.load(labels + first + row, mask=takes_part, other=0).to(tl.int32)
        column = tl.arange(0, WIDTH)
        place = row[:, None] * classes + column[None, :]
        exists = takes_part[:, None] & (column[None, :] < classes)
        x = tl.load(logits + first * classes + place, mask=exists, other=float("-inf")).to(tl.float32)
        shift = tl.where(takes_part, tl.max(x, 1), 0.0)
        powers = tl.exp(x - shift[:, None])
        softmax = powers / tl.where(takes_part, tl.sum(powers, 1), 1.0)[:, None]
        slope = (softmax - (column[None, :] == label[:, None]).to(tl.float32)) * share[:, None]
        tl.store(to_logits + first * classes + place, slope.to(to_logits.dtype.element_ty), mask=exists)
        positive = (takes_part & (label > 0))[:, None]
        place = row[:, None] * 4 + tl.arange(0, 4)[None, :]
        apart = tl.load(offsets + first * 4 + place, mask=positive, other=0.0).to(tl.float32)
        apart -= tl.load(wanted + first * 4 + place, mask=positive, other=0.0)
        slope = tl.minimum(tl.maximum(apart, -1.0), 1.0) * share[:, None]
        tl.store(to_offsets + first * 4 + place, slope.to(to_offsets.dtype.element_ty), mask=positive)
