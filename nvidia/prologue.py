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


def prologue(images: Tensor, dtype: torch.dtype, channels: int = 3, flips: Tensor | None = None) -> Tensor:
    """uint8 (N, H, W, 3) → (N, channels, H, W) in channels-last memory, with ImageNet's mean and deviation.

    ``channels`` 4 adds one of zeros, which tensor cores like. ``flips`` bool (N) says which images are mirrored left to right, for
    loaders that leave it to the device; their boxes are the caller's. On the CPU without Triton's interpreter plain torch does it.
    """
    if images.dtype is not torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 (N, H, W, 3), and are {images.dtype} {tuple(images.shape)}")
    if channels not in (3, 4):
        raise ValueError(f"an image gets 3 channels or 4, not {channels}")
    if flips is not None and (flips.dtype, flips.shape, flips.device) != (torch.bool, images.shape[:1], images.device):
        found = f"{flips.dtype} {tuple(flips.shape)} on {flips.device}"
        raise ValueError(f"flips must be bool ({len(images)}) on {images.device}, and are {found}")
    if not on_kernels(images):
        if flips is not None:
            images = torch.where(flips[:, None, None, None], images.flip(2), images)
        x = normalise(images).to(dtype)
        return functional.pad(x, (0, 0, 0, 0, 0, channels - 3)).contiguous(memory_format=torch.channels_last)
    return prologue_op(images, dtype, channels, flips).permute(0, 3, 1, 2)


@torch.library.custom_op(f"{LIBRARY}::prologue", mutates_args=())
def prologue_op(images: Tensor, dtype: torch.dtype, channels: int, flips: Tensor | None = None) -> Tensor:
    """uint8 (N, H, W, 3) → (N, H, W, channels). Floor: 3 bytes read and channels · itemsize written a pixel."""
    images = images.contiguous()
    out = torch.empty(*images.shape[:3], channels, dtype=dtype, device=images.device)
    if out.numel():
        size = block(images, BLOCK)
        given = images, images if flips is None else flips.contiguous(), out, out.numel(), *images.shape[1:3]
        normalise_bytes[(triton.cdiv(out.numel(), size),)](*given, channels, flips is not None, size)
    return out


@prologue_op.register_fake
def _(images, dtype, channels, flips=None):
    return images.new_empty(*images.shape[:3], channels, dtype=dtype)


@triton.jit
def normalise_bytes(images, flips, out, count, height, width, CHANNELS: tl.constexpr, FLIP: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the output's numbers, each from its byte; of a mirrored image from that of the same row's other end."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    number = start + tl.arange(0, BLOCK)
    if CHANNELS == 3 and not FLIP:  # bytes and numbers lie alike: whole vectors are read
        channel = ((start % 3).to(tl.int32) + tl.arange(0, BLOCK)) % 3
        x = tl.load(images + start + tl.arange(0, BLOCK), mask=number < count, other=0).to(tl.float32)
    else:
        pixel, channel = number // CHANNELS, number % CHANNELS
        real = (number < count) & (channel < 3)
        if FLIP:
            mirrored = tl.load(flips + pixel // (height * width), mask=number < count, other=0)
            pixel = tl.where(mirrored, pixel + width - 1 - 2 * (pixel % width), pixel)
        x = tl.load(images + pixel * 3 + channel, mask=real, other=0).to(tl.float32)
    scale = tl.where(channel == 0, SCALE_R, tl.where(channel == 1, SCALE_G, SCALE_B))
    shift = tl.where(channel == 0, SHIFT_R, tl.where(channel == 1, SHIFT_G, SHIFT_B))
    y = tl.where(channel < 3, x * scale + shift, 0.0)
    tl.store(out + number, y.to(out.dtype.element_ty), mask=number < count)


SCALE_R, SCALE_G, SCALE_B = SCALE
SHIFT_R, SHIFT_G, SHIFT_B = SHIFT
