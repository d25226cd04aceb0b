"""The backbone's first convolution, 7×7 at stride 2 on three channels, as 4×4 at stride 1 on sixteen, which tensor cores like.

Each 2×2 square of pixels becomes one pixel of twelve channels (space to depth, as in MLPerf submissions for ResNet), four zeros fill
them up to sixteen, and the weight is laid out to match: the same products, added in another order. The weight keeps its shape.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional

from .kernels import LIBRARY, block, on_kernels
from .norm import KINDS

BLOCK = 4096  # numbers of one program, where images are folded
CHANNELS = 16
PIXELS, PARTS, LAUNCH = 32, 264, {"num_warps": 4}  # of the weight's gradient: pixels at a time, programs (two a multiprocessor of a large GPU)


def fits(convolution: nn.Module, images: Tensor) -> bool:
    """Whether `stem` is this convolution of these images; gradients of images are left to torch."""
    shapes = {"kernel_size": (7, 7), "stride": (2, 2), "padding": (3, 3), "dilation": (1, 1), "in_channels": 3, "groups": 1, "bias": None}
    shapes["padding_mode"] = "zeros"
    same = type(convolution) is nn.Conv2d and all(getattr(convolution, name) == value for name, value in shapes.items())
    return same and images.dim() == 4 and images.dtype in KINDS and not images.requires_grad


def stem(images: Tensor, weight: Tensor) -> Tensor:
    """Images (N, 3, H, W) and a weight (C, 3, 7, 7) → (N, C, rows, columns), in the dtype that autocast, if on, gives.

    On the CPU without Triton's interpreter torch does it.
    """
    if not on_kernels(images):
        return functional.conv2d(images, weight, stride=2, padding=3)
    eight = functional.pad(weight, (0, 1, 0, 1))  # the weight that is added meets a pixel that is there, and is 0
    folded = eight.reshape(-1, 3, 4, 2, 4, 2).permute(0, 3, 5, 1, 2, 4).reshape(-1, 12, 4, 4)
    padded = functional.pad(folded, (0, 0, 0, 0, 0, CHANNELS - 12))
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    return convolve(fold_images(images.to(dtype)), padded)


@torch.library.custom_op(f"{LIBRARY}::fold_images", mutates_args=())
def fold_images(images: Tensor) -> Tensor:
    """(N, 3, H, W) → (N, rows + 3, columns + 3, 16), of which [n, y, x, 6·a + 3·b + c] is images[n, c, 2·y + a - 3, 2·x + b - 3].

    Floor: the images' bytes, and 5 1/3 times as many written.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    count, _, height, width = images.shape
    out = images.new_empty(count, (height + 1) // 2 + 3, (width + 1) // 2 + 3, CHANNELS)
    each = out[0].numel() if count else 0
    if each:
        size = block(images, BLOCK)
        fold[(triton.cdiv(each, size), count)](images, out, each, height, width, out.shape[2], CHANNELS, size)
    return out


@fold_images.register_fake
def _(images):
    count, _, height, width = images.shape
    return images.new_empty(count, (height + 1) // 2 + 3, (width + 1) // 2 + 3, CHANNELS)


@torch.library.custom_op(f"{LIBRARY}::convolve_folded", mutates_args=())
def convolve(folded: Tensor, weight: Tensor) -> Tensor:
    """(N, rows + 3, columns + 3, 16) and (C, 16, 4, 4) → (N, C, rows, columns) in channels-last memory, in the former's dtype.

    The weight comes, and has its gradient, in its own: sums over so many pixels, times a loss scale, are too large for float16.
    """
    weight = weight.to(folded.dtype, memory_format=torch.channels_last)
    return functional.conv2d(folded.permute(0, 3, 1, 2), weight).contiguous(memory_format=torch.channels_last)


@convolve.register_fake
def _(folded, weight):
    images, height, width, _ = folded.shape
    return folded.new_empty(images, height - 3, width - 3, len(weight)).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{LIBRARY}::convolve_folded_backward", mutates_args=())
def to_weight(folded: Tensor, slope: Tensor) -> Tensor:
    """→ the gradient of the weight, float32 (C, 16, 4, 4).

    Two million pixels for each of few numbers, which a convolution library is not made for. Sums are taken in two stages, in an order
    that depends on the shape alone. Floor: both tensors' bytes.
    """
    slope = slope.contiguous(memory_format=torch.channels_last)
    images, count, rows, columns = slope.shape
    pixels, size = images * rows * columns, block(slope, PIXELS)
    parts, wide = min(PARTS, triton.cdiv(pixels, size)), max(16, triton.next_power_of_2(count))
    partial = torch.empty(parts, 4, wide, 4 * CHANNELS, device=slope.device)
    if pixels:
        exact = "ieee" if slope.dtype is torch.float32 else "tf32"  # which is said of float32 alone
        add_products[(parts,)](folded, slope, partial, pixels, rows, columns, count, wide, 4 * CHANNELS, size, exact, **LAUNCH)
    total = partial.sum(0)[:, :count].view(4, count, 4, CHANNELS)
    return total.permute(1, 3, 0, 2).contiguous()


@to_weight.register_fake
def _(folded, slope):
    return slope.new_empty(slope.shape[1], CHANNELS, 4, 4, dtype=torch.float32)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.dtype = inputs[1].dtype


def _differentiate(ctx, slope):
    return None, to_weight(*ctx.saved_tensors, slope).to(ctx.dtype)


convolve.register_autograd(_differentiate, setup_context=_keep)


@triton.jit
def add_products(
    folded, slope, partial, pixels, rows, columns, count, WIDE: tl.constexpr, ACROSS: tl.constexpr, PIXELS: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """partial (parts, 4, C, 4·16): over part p of the pixels, the products of the slope with the four rows of four pixels it came from."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel, across = tl.arange(0, WIDE), tl.arange(0, ACROSS)
    wide = columns + 3
    a = tl.zeros((WIDE, ACROSS), tl.float32)
    b = tl.zeros((WIDE, ACROSS), tl.float32)
    c = tl.zeros((WIDE, ACROSS), tl.float32)
    d = tl.zeros((WIDE, ACROSS), tl.float32)
    for start in range(part, tl.cdiv(pixels, PIXELS), parts):
        pixel = start * PIXELS + tl.arange(0, PIXELS)
        exists = pixel < pixels
        row = pixel // columns
        image = row // rows
        given = exists[:, None] & (channel < count)[None, :]
        g = tl.trans(tl.load(slope + pixel.to(tl.int64)[:, None] * count + channel[None, :], mask=given, other=0.0))
        # Four pixels of a row are 4·16 numbers on end; the rows of an image are three more than those of the slope.
        place = ((row + 3 * image).to(tl.int64) * wide + pixel % columns)[:, None] * 16 + across[None, :]
        there = exists[:, None] & (across >= 0)[None, :]
        a = tl.dot(g, tl.load(folded + place, mask=there, other=0.0), a, input_precision=EXACT)
        b = tl.dot(g, tl.load(folded + place + wide * 16, mask=there, other=0.0), b, input_precision=EXACT)
        c = tl.dot(g, tl.load(folded + place + wide * 32, mask=there, other=0.0), c, input_precision=EXACT)
        d = tl.dot(g, tl.load(folded + place + wide * 48, mask=there, other=0.0), d, input_precision=EXACT)
    to = partial + part * (4 * WIDE * ACROSS) + channel[:, None] * ACROSS + across[None, :]
    tl.store(to, a)
    tl.store(to + WIDE * ACROSS, b)
    tl.store(to + 2 * WIDE * ACROSS, c)
    tl.store(to + 3 * WIDE * ACROSS, d)


@triton.jit
def fold(images, out, each, height, width, columns, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of an image's numbers."""
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part, place = number % CHANNELS, number // CHANNELS
    row, column = 2 * (place // columns) + part // 6 - 3, 2 * (place % columns) + part % 6 // 3 - 3
    exists = (number < each) & (part < 12) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    value = tl.load(images + image * height * width * 3 + (row * width + column) * 3 + part % 3, mask=exists, other=0.0)
    tl.store(out + image * each + number, value, mask=number < each)
