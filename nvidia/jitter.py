"""The colour jitter of a batch on its device, for loaders whose pictures are there.

It is PIL's arithmetic on 8 bits: whole numbers between two changes, hue through its 8-bit HSV. Each picture has its own
order of changes. Which pictures turn their hue at which place is known on the host, so no step waits for the device.
"""

import numpy as np
import torch
from base.backends.reference import augment as rules
from torch import Tensor

JITTER = np.array([rules.BRIGHTNESS, rules.CONTRAST, rules.SATURATION, rules.HUE])
NEUTRAL = np.array([1, 1, 1, 0])
CONTRAST, HUE = 1, 3  # places in JITTER


def jitter(images: Tensor, amounts: Tensor, order: Tensor) -> Tensor:
    """The reference's `colour_jitter` of a batch: uint8 (N, H, W, 3), amounts float64 (N, 4), order int64 (N, 4) → uint8.

    ``amounts``: factors of brightness, contrast and saturation, and the turn of the hue; ``order``: which of them comes
    first, second, …. These two are on the CPU; the pictures may be on any device. Equal to PIL's to the bit on the CPU.
    """
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
