"""What stands before the first convolution: bytes to normalised numbers in the model's precision, in one pass."""

import torch
import triton
import triton.language as tl
from base.backends.reference.step import DEVIATION, MEAN, normalise
from torch import Tensor
from torch.nn import functional

from .kernels import LIBRARY, block, on_kernels

BLOCK = 2048
SCALE = tuple(tl.constexpr(1 / (255 * d)) for d in DEVIATION)
SHIFT = tuple(tl.constexpr(-m / d) for m, d in zip(MEAN, DEVIATION, strict=True))


def prologue(images: Tensor, dtype: torch.dtype, channels: int = 3) -> Tensor:
    """uint8 (N, H, W, 3) → (N, channels, H, W) in channels-last memory, with ImageNet's mean and deviation.

    ``channels`` 4 adds one of zeros, which tensor cores like. On the CPU without Triton's interpreter plain torch does it.
    """
    if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), and are {images.dtype} {tuple(images.shape)}")
    if channels not in (3, 4):
        raise ValueError(f"an image gets 3 channels or 4, not {channels}")
    if not on_kernels(images):
        x = normalise(images).to(dtype)
        return functional.pad(x, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=torch.channels_last)
    return prologue_op(images, dtype, channels).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{LIBRARY}::prologue", mutates_args=())
def prologue_op(images: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """uint8 (N, H, W, 3) → (N, H, W, channels). Floor: 3 bytes read and channels · itemsize written a pixel."""
    images = images.contiguous()
    out = torch.empty(*images.shape[:3], channels, dtype=dtype, device=images.device)
    if out.numel():
        size = block(images, BLOCK)
        normalise_bytes[(triton.cdiv(out.numel(), size),)](images, out, out.numel(), channels, size)
    return out


@prologue_op.register_fake
def _(images, dtype, channels):
    return images.new_empty(*images.shape[:3], channels, dtype=dtype)


@triton.jit
def normalise_bytes(images, out, count, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = number % CHANNELS
    real = (number < count) & (channel < 3)
    x = tl.load(images + number // CHANNELS * 3 + channel, mask=real, other=0).to(tl.float32)
    scale = tl.where(channel == 0, SCALE_R, tl.where(channel == 1, SCALE_G, SCALE_B))
    shift = tl.where(channel == 0, SHIFT_R, tl.where(channel == 1, SHIFT_G, SHIFT_B))
    y = tl.where(channel < 3, x * scale + shift, 0.0)
    tl.store(out + number, y.to(out.dtype.element_ty), mask=number < count)


SCALE_R, SCALE_G, SCALE_B = SCALE
SHIFT_R, SHIFT_G, SHIFT_B = SHIFT
