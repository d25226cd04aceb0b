"""The backbone's pooling as Triton kernels over channels-last memory: 3×3 windows at stride 2, padding 1.

Where torch keeps eight bytes to find each maximum again, here it is one; where its backward pass adds with atomics, here each pixel
asks the four windows that hold it. Floor: forward x, y and a byte for each number of y; backward the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

from .kernels import LIBRARY, block, on_kernels
from .norm import KINDS

CELLS, CHANNELS = 16, 64  # of one program
LAUNCH = {"num_warps": 4}


def fits(pool: nn.Module, x: Tensor) -> bool:
    """Whether `max_pool` is this pooling of this input."""
    square = all(getattr(pool, name, None) in (value, (value, value)) for name, value in (("kernel_size", 3), ("stride", 2), ("padding", 1)))
    plain = type(pool) is nn.MaxPool2d and pool.dilation in (1, (1, 1)) and not pool.ceil_mode and not pool.return_indices
    return square and plain and x.dim() == 4 and x.dtype in KINDS and x.numel() > 0


def max_pool(x: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C, rows, columns), both in channels-last memory; what is not a number passes, as in torch.

    On the CPU without Triton's interpreter torch does it.
    """
    return max_pool_op(x)[0] if on_kernels(x) else functional.max_pool2d(x, 3, 2, 1)


def _grid(cells: int, channels: int, images: int, on: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(cells, block(on, CELLS)), triton.cdiv(channels, CHANNELS), images


@torch.library.custom_op(f"{LIBRARY}::max_pool", mutates_args=())
def max_pool_op(x: Tensor) -> tuple[Tensor, Tensor]:
    """→ the maxima, and where in its window each is, 0 to 8: uint8 (N, rows, columns, C)."""
    x = x.contiguous(memory_format=torch.channels_last)
    images, channels, height, width = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    y = x.new_empty(images, rows, columns, channels)
    place = torch.empty(y.shape, dtype=torch.uint8, device=x.device)
    maxima[_grid(rows * columns, channels, images, x)](x, y, place, height, width, rows, columns, channels, block(x, CELLS), CHANNELS, **LAUNCH)
    return y.permute(0, 3, 1, 2), place


@max_pool_op.register_fake
def _(x):
    images, channels, height, width = x.shape
    y = x.new_empty(images, (height + 1) // 2, (width + 1) // 2, channels)
    return y.permute(0, 3, 1, 2), torch.empty_like(y, dtype=torch.uint8)


@torch.library.custom_op(f"{LIBRARY}::max_pool_backward", mutates_args=())
def max_pool_backward(slope: Tensor, place: Tensor, height: int, width: int) -> Tensor:
    """→ the gradient of x (N, C, height, width)."""
    slope = slope.contiguous(memory_format=torch.channels_last)
    images, channels, rows, columns = slope.shape
    to_x = slope.new_empty(images, height, width, channels)
    given = slope, place, to_x, height, width, rows, columns, channels
    to_pixels[_grid(height * width, channels, images, slope)](*given, block(slope, CELLS), CHANNELS, **LAUNCH)
    return to_x.permute(0, 3, 1, 2)


@max_pool_backward.register_fake
def _(slope, place, height, width):
    images, channels = slope.shape[:2]
    return slope.new_empty(images, height, width, channels).permute(0, 3, 1, 2)


def _keep(ctx, inputs, output):
    _, place = output
    ctx.mark_non_differentiable(place)
    ctx.save_for_backward(place)
    ctx.size = tuple(inputs[0].shape[2:])


def _differentiate(ctx, slope, _):
    return max_pool_backward(slope, *ctx.saved_tensors, *ctx.size)


max_pool_op.register_autograd(_differentiate, setup_context=_keep)


@triton.jit
def maxima(x, y, place, height, width, rows, columns, channels, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """A block of cells and channels of an image's y. Of equal ones the first is the maximum."""
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (cell < rows * columns)[:, None] & (channel < channels)
    top, left = 2 * (cell // columns) - 1, 2 * (cell % columns) - 1
    x += image * height * width * channels
    most = tl.full((CELLS, CHANNELS), float("-inf"), tl.float32)
    found = tl.zeros((CELLS, CHANNELS), tl.int32)
    for k in tl.static_range(9):
        row, column = top + k // 3, left + k % 3
        exists = inside & ((row >= 0) & (row < height) & (column >= 0) & (column < width))[:, None]
        value = tl.load(x + ((row * width + column) * channels)[:, None] + channel, mask=exists, other=float("-inf")).to(tl.float32)
        # The first that exists is taken even if all are -inf; what is not a number stays.
        better = exists & ((value > most) | (value != value) | ((value == most) & (found == 0)))
        found = tl.where(better, k + 1, found)
        most = tl.where(better, value, most)
    to = image * rows * columns * channels + (cell * channels)[:, None] + channel
    tl.store(y + to, most.to(y.dtype.element_ty), mask=inside)
    tl.store(place + to, (found - 1).to(tl.uint8), mask=inside)


@triton.jit
def to_pixels(slope, place, to_x, height, width, rows, columns, channels, CELLS: tl.constexpr, CHANNELS: tl.constexpr):
    """A block of the gradients of an image's x: the sum of the slopes of the windows, four at most, whose maximum it is."""
    image = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = (pixel < height * width)[:, None] & (channel < channels)
    y, x = pixel // width, pixel % width
    slope += image * rows * columns * channels
    place += image * rows * columns * channels
    total = tl.zeros((CELLS, CHANNELS), tl.float32)
    for k in tl.static_range(4):
        row, column = y // 2 + k // 2, x // 2 + k % 2
        down, right = y + 1 - 2 * row, x + 1 - 2 * column
        exists = inside & ((row < rows) & (column < columns) & (down >= 0) & (right >= 0))[:, None]
        at = ((row * columns + column) * channels)[:, None] + channel
        here = tl.load(place + at, mask=exists, other=255).to(tl.int32) == (down * 3 + right)[:, None]
        total += tl.where(here, tl.load(slope + at, mask=exists, other=0.0).to(tl.float32), 0.0)
    to = image * height * width * channels + (pixel * channels)[:, None] + channel
    tl.store(to_x + to, total.to(to_x.dtype.element_ty), mask=inside)
