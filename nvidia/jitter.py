"""The colour jitter of a batch on its device, for loaders whose pictures are there.

It is PIL's arithmetic on 8 bits: whole numbers between two changes, hue through its 8-bit HSV. Each picture has its own
order of changes. Nothing waits for the device.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from base.backends.reference import augment as rules
from torch import Tensor

from .kernels import LIBRARY, block, on_kernels

JITTER = np.array([rules.BRIGHTNESS, rules.CONTRAST, rules.SATURATION, rules.HUE])
NEUTRAL = np.array([1, 1, 1, 0])
CONTRAST, HUE = 1, 3  # places in JITTER
PIXELS = 1024  # of one program


def jitter(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """The reference's `colour_jitter` of a batch: uint8 (N, H, W, 3), amounts float64 (N, 4), order int64 (N, 4) → uint8.

    ``amounts``: factors of brightness, contrast and saturation, and the turn of the hue; ``order``: which of them comes
    first, second, …. These two are on the CPU; the pictures may be on any device. Equal to PIL's to the bit on the CPU.
    """
    if not on_kernels(images):
        return plain_jitter(images, amounts, order)
    factors = amounts.float()
    factors[:, HUE] = (amounts[:, HUE] * 255).trunc()
    return jitter_op(images, *(t.to(images.device, non_blocking=True) for t in (factors, order.int())))


def plain_jitter(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """The same in plain torch: what the kernels are held to, and what a CPU does."""
    pixels = images.float()
    for changes in order.T:
        factors = torch.where(changes == HUE, 1, amounts.gather(1, changes[:, None])[:, 0]).float()
        factors, kinds = (t.to(images.device)[:, None, None, None] for t in (factors, changes))
        red, green, blue = pixels.split(1, -1)
        grey = ((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536).floor_()  # PIL's; whole numbers below 2^24 are exact
        mean = (grey.mean((1, 2, 3), keepdim=True, dtype=torch.float64) + 0.5).floor().float()
        towards = torch.where(kinds < CONTRAST, 0, torch.where(kinds == CONTRAST, mean, grey))  # black, mean grey, own grey
        pixels = pixels.sub_(towards).mul_(factors).add_(towards).clamp_(0, 255).floor_()  # one after the other: no fused rounding
        rows = (changes == HUE).nonzero()[:, 0]
        turns = (amounts[rows, HUE] * 255).trunc().float().to(images.device)
        rows = rows.to(images.device)
        pixels[rows] = turn_hue(pixels[rows], turns)
    return pixels.byte()


def turn_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Whole numbers 0…255 (N, H, W, 3) → the same with the hue turned by ``turns`` (N) 255ths, through PIL's 8-bit HSV."""
    value = pixels.amax(-1)
    chroma = value - pixels.amin(-1)
    away = (value[..., None] - pixels) / chroma.clamp(min=1)[..., None]  # of each channel from the largest, in [0, 1]
    red, green, blue = away.double().unbind(-1)  # 64 and 32 bits in turn, as in PIL: what is rounded down next tells them apart
    hue = torch.where(red == 0, blue - green, torch.where(green == 0, 2 + red - blue, 4 + green - red)).float()
    hue, saturation = ((hue.double() / 6 + 1) % 1).float(), chroma / value.clamp(min=1)
    hue, saturation = ((part.double() * 255).floor().float() for part in (hue, saturation))
    sector = (hue + turns[:, None, None]) % 256 * (6 / 255)  # 0…6
    parts = (2 - (sector - 3).abs(), (sector - 2).abs() - 1, (sector - 4).abs() - 1)
    return (value[..., None] * (1 - (saturation / 255)[..., None] * torch.stack(parts, -1).clamp_(0, 1)) + 0.5).floor_()


@torch.library.custom_op(f"{LIBRARY}::jitter", mutates_args=())
def jitter_op(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """uint8 (N, H, W, 3), factors float32 (N, 4), with the hue's turn in 255ths, order int32 (N, 4) → uint8 (N, H, W, 3).

    Floor: 9 bytes a pixel over the memory's bandwidth: contrast needs the whole picture's mean grey, so all is read twice.
    """
    images, out = images.contiguous(), torch.empty_like(images, memory_format=torch.contiguous_format)
    pixels = images.shape[1] * images.shape[2]
    sums = torch.zeros(len(images), dtype=torch.long, device=images.device)
    if out.numel():
        some = block(images, PIXELS)
        grid = triton.cdiv(pixels, some), len(images)  # the second may be 65,535 at most
        given = images, factors.contiguous(), order.contiguous(), sums, pixels
        # Each operation rounds by itself, as PIL's do: a fused one could end on the other side of a whole number.
        add_grey[grid](*given, some, enable_fp_fusion=False)
        apply_changes[grid](*given, out, some, enable_fp_fusion=False)
    return out


@jitter_op.register_fake
def _(images, factors, order):
    return torch.empty_like(images, memory_format=torch.contiguous_format)


@triton.jit
def load_pixels(images, number, inside):
    red = tl.load(images + 3 * number, mask=inside, other=0).to(tl.float32)
    green = tl.load(images + 3 * number + 1, mask=inside, other=0).to(tl.float32)
    blue = tl.load(images + 3 * number + 2, mask=inside, other=0).to(tl.float32)
    return red, green, blue


@triton.jit
def grey_of(red, green, blue):
    return tl.floor((red * 19595 + green * 38470 + blue * 7471 + 32768) / 65536)


@triton.jit
def moved(channel, towards, factor):
    return tl.floor(tl.minimum(tl.maximum((channel - towards) * factor + towards, 0.0), 255.0))


@triton.jit
def from_hue(value, saturation, part):
    return tl.floor(value * (1 - saturation * tl.minimum(tl.maximum(part, 0.0), 1.0)) + 0.5)


@triton.jit
def changed(red, green, blue, kind, factor, mean):
    """One change of whole pictures: kind 0 brightness, 1 contrast, 2 saturation, 3 hue, as in `plain_jitter` and `turn_hue`."""
    if kind == 3:
        value = tl.maximum(tl.maximum(red, green), blue)
        chroma = value - tl.minimum(tl.minimum(red, green), blue)
        least = tl.maximum(chroma, 1.0)
        r = tl.div_rn(value - red, least).to(tl.float64)
        g = tl.div_rn(value - green, least).to(tl.float64)
        b = tl.div_rn(value - blue, least).to(tl.float64)
        hue = tl.where(r == 0, b - g, tl.where(g == 0, 2 + r - b, 4 + g - r)).to(tl.float32)
        turned = hue.to(tl.float64) / 6 + 1
        hue = (turned - tl.floor(turned)).to(tl.float32)
        hue = tl.floor(hue.to(tl.float64) * 255).to(tl.float32) + factor
        saturation = tl.floor(tl.div_rn(chroma, tl.maximum(value, 1.0)).to(tl.float64) * 255).to(tl.float32)
        saturation = tl.div_rn(saturation, tl.full(saturation.shape, 255.0, tl.float32))
        sector = (hue - 256 * tl.floor(hue / 256)) * (6 / 255)
        red = from_hue(value, saturation, 2 - tl.abs(sector - 3))
        green = from_hue(value, saturation, tl.abs(sector - 2) - 1)
        blue = from_hue(value, saturation, tl.abs(sector - 4) - 1)
    else:
        grey = grey_of(red, green, blue)
        towards = tl.where(kind == 0, 0.0, tl.where(kind == 1, mean, grey))
        red, green, blue = moved(red, towards, factor), moved(green, towards, factor), moved(blue, towards, factor)
    return red, green, blue


@triton.jit
def add_grey(images, factors, order, sums, pixels, BLOCK: tl.constexpr):
    """Each picture's sum of grey, a whole number, as its contrast finds it: after the changes before that."""
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < pixels
    red, green, blue = load_pixels(images + image * pixels * 3, number, inside)
    before = 1
    for place in range(4):
        kind = tl.load(order + image * 4 + place)
        if kind == 1:
            before = 0
        if before == 1:
            red, green, blue = changed(red, green, blue, kind, tl.load(factors + image * 4 + kind), 0.0)
    grey = tl.where(inside, grey_of(red, green, blue), 0.0).to(tl.int64)
    tl.atomic_add(sums + image, tl.sum(grey, 0))


@triton.jit
def apply_changes(images, factors, order, sums, pixels, out, BLOCK: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = number < pixels
    red, green, blue = load_pixels(images + image * pixels * 3, number, inside)
    mean = tl.floor(tl.load(sums + image).to(tl.float64) / pixels + 0.5).to(tl.float32)
    for place in range(4):
        kind = tl.load(order + image * 4 + place)
        red, green, blue = changed(red, green, blue, kind, tl.load(factors + image * 4 + kind), mean)
    to = out + image * pixels * 3 + 3 * number
    tl.store(to, red.to(tl.uint8), mask=inside)
    tl.store(to + 1, green.to(tl.uint8), mask=inside)
    tl.store(to + 2, blue.to(tl.uint8), mask=inside)
