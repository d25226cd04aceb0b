"""All heads as one convolution a level, and one kernel a level that adds the bias and puts offsets and logits where they belong.

A level's two heads read the same numbers; together, filled up to a multiple of eight channels, they are one convolution that cuDNN
need not pad. Floor of the kernel: each of the heads' numbers, read once and written once, forward and backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

from base.contracts import Predictions

from .kernels import LIBRARY, block, on_kernels
from .norm import KINDS

MULTIPLE = 8  # channels that a tensor core's convolution takes at a time
ROWS, COLUMNS = 16, 128  # cells and channels of one program


def fits(offset_heads: nn.ModuleList, class_heads: nn.ModuleList, levels: list[Tensor], classes: int) -> bool:
    """Whether `apply_heads` knows such heads: two of a level look at the same cells."""
    kinds = {"kernel_size": (3, 3), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
    heads = [*offset_heads, *class_heads]
    same = all(type(head) is nn.Conv2d and head.bias is not None and all(getattr(head, k) == v for k, v in kinds.items()) for head in heads)
    together = all(a.stride == b.stride for a, b in zip(offset_heads, class_heads, strict=True))
    paired = all(k.out_channels == o.out_channels // 4 * classes for o, k in zip(offset_heads, class_heads, strict=True))
    return same and together and paired and all(on_kernels(level) and level.dtype in KINDS and level.numel() > 0 for level in levels)


def apply_heads(offset_heads: nn.ModuleList, class_heads: nn.ModuleList, levels: list[Tensor], classes: int) -> Predictions:
    """Levels (N, C, rows, columns) → offsets (N, A, 4) and logits (N, A, classes), in the dtype that autocast, if on, gives."""
    outputs, biases, boxes = [], [], []
    for offset, kind, level in zip(offset_heads, class_heads, levels, strict=True):
        weight, bias = torch.cat([offset.weight, kind.weight]), torch.cat([offset.bias, kind.bias])
        extra = -len(weight) % MULTIPLE
        weight = functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, extra)).contiguous(memory_format=torch.channels_last)
        outputs.append(functional.conv2d(level, weight, stride=offset.stride, padding=1))
        biases.append(bias.float())
        boxes.append(offset.out_channels // 4)
    return Predictions(*gather(outputs, biases, boxes, classes))


def _cells(output: Tensor) -> int:
    return output.shape[2] * output.shape[3]


def _grid(cells: int, images: int, width: int, on: Tensor) -> tuple[tuple[int, int, int], int]:
    some = block(on, ROWS)
    return (triton.cdiv(cells, some), triton.cdiv(width, COLUMNS), images), some


@torch.library.custom_op(f"{LIBRARY}::gather_heads", mutates_args=())
def gather(outputs: list[Tensor], biases: list[Tensor], boxes: list[int], classes: int) -> tuple[Tensor, Tensor]:
    """Of each level the convolution's (N, channels, rows, columns), the bias float32 and the default boxes of a cell → offsets, logits."""
    first, images = outputs[0], len(outputs[0])
    count = sum(_cells(output) * n for output, n in zip(outputs, boxes, strict=True))
    offsets, logits = first.new_empty(images, count, 4), first.new_empty(images, count, classes)
    start = 0
    for output, bias, n in zip(outputs, biases, boxes, strict=True):
        output, cells = output.contiguous(memory_format=torch.channels_last), _cells(output)
        grid, some = _grid(cells, images, output.shape[1], output)
        place[grid](output, bias, offsets, logits, start, count, cells, output.shape[1], n, classes, some, COLUMNS)
        start += cells * n
    return offsets, logits


@gather.register_fake
def _(outputs, biases, boxes, classes):
    first, count = outputs[0], sum(_cells(output) * n for output, n in zip(outputs, boxes, strict=True))
    return first.new_empty(len(first), count, 4), first.new_empty(len(first), count, classes)


@torch.library.custom_op(f"{LIBRARY}::gather_heads_backward", mutates_args=())
def gather_backward(to_offsets: Tensor, to_logits: Tensor, shapes: list[int], boxes: list[int]) -> list[Tensor]:
    """→ the gradients of the convolutions' outputs, then those of the biases; ``shapes``: channels, rows and columns of each level."""
    to_offsets, to_logits = to_offsets.contiguous(), to_logits.contiguous()
    images, count, classes = to_logits.shape
    to_outputs, to_biases, start = [], [], 0
    for channels, rows, columns, n in zip(*(shapes[k::3] for k in range(3)), boxes, strict=True):
        to_output = to_logits.new_empty(images, rows, columns, channels)
        grid, some = _grid(rows * columns, images, channels, to_output)
        take[grid](to_offsets, to_logits, to_output, start, count, rows * columns, channels, n, classes, some, COLUMNS)
        start += rows * columns * n
        to_outputs.append(to_output.permute(0, 3, 1, 2))
        to_biases.append(to_output.view(-1, channels)[:, : n * (4 + classes)].sum(0, dtype=torch.float32))
    return to_outputs + to_biases


@gather_backward.register_fake
def _(to_offsets, to_logits, shapes, boxes):
    images, _, classes = to_logits.shape
    sizes = list(zip(*(shapes[k::3] for k in range(3)), strict=True))
    outputs = [to_logits.new_empty(images, rows, columns, channels).permute(0, 3, 1, 2) for channels, rows, columns in sizes]
    return outputs + [to_logits.new_empty(n * (4 + classes), dtype=torch.float32) for n in boxes]


def _keep(ctx, inputs, output):
    outputs, _, ctx.boxes, _ = inputs
    ctx.shapes = [side for level in outputs for side in level.shape[1:]]


def _differentiate(ctx, to_offsets, to_logits):
    found = gather_backward(to_offsets, to_logits, ctx.shapes, ctx.boxes)
    return found[: len(ctx.boxes)], found[len(ctx.boxes) :], None, None


gather.register_autograd(_differentiate, setup_context=_keep)


@triton.jit
def place(
    output, bias, offsets, logits, start, count, cells, channels, boxes, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A block of cells and channels of an image: first 4 offsets of each default box, then its logits, then what fills up."""
    image = tl.program_id(2).to(tl.int64)
    cell = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # of large images times many classes
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (cell < cells) & (channel < channels)
    value = tl.load(output + image * cells * channels + cell * channels + channel, mask=inside, other=0.0).to(tl.float32)
    own = channel < boxes * (4 + classes)
    value += tl.load(bias + channel, mask=own, other=0.0)
    is_offset = channel < 4 * boxes
    value = value.to(offsets.dtype.element_ty)
    tl.store(offsets + (image * count + start) * 4 + cell * (4 * boxes) + channel, value, mask=inside & is_offset)
    to = logits + (image * count + start) * classes + cell * (classes * boxes) + (channel - 4 * boxes)
    tl.store(to, value, mask=inside & own & (channel >= 4 * boxes))


@triton.jit
def take(
    to_offsets, to_logits, to_output, start, count, cells, channels, boxes, classes, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The reverse of `place`, zeros where it fills up."""
    image = tl.program_id(2).to(tl.int64)
    cell = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # of large images times many classes
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (cell < cells) & (channel < channels)
    is_offset = channel < 4 * boxes
    a = tl.load(to_offsets + (image * count + start) * 4 + cell * (4 * boxes) + channel, mask=inside & is_offset, other=0.0)
    is_logit = (channel >= 4 * boxes) & (channel < boxes * (4 + classes))
    from_ = to_logits + (image * count + start) * classes + cell * (classes * boxes) + (channel - 4 * boxes)
    b = tl.load(from_, mask=inside & is_logit, other=0.0)
    tl.store(to_output + image * cells * channels + cell * channels + channel, tl.where(is_offset, a, b), mask=inside)
