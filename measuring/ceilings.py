"""What the machine itself does in a second, measured in the same rounds as what is held to it."""

import importlib.util
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from measuring.figures import Figure
from measuring.timing import Cases, interleaved

COPIED = 256 << 20  # bytes, more than caches hold
SIDE = 1024  # of the matrices
IMAGES, CELLS, CHANNELS = 8, 38, 256  # of the convolution: that of SSD300's largest level, where most of its operations are
SORTED = 1_000_000


@dataclass(frozen=True)
class Ceiling:
    """A rate of the machine: ``run`` does ``amount`` of ``unit``."""

    name: str
    unit: str
    amount: float
    run: Callable[[], object]


@dataclass(frozen=True)
class Limit:
    """What a piece of work takes of the machine: ``need`` of the unit of ``by`` for one of its own; the fastest of ``by`` counts."""

    by: tuple[Ceiling, ...]
    need: float
    how: str


def copying() -> tuple[Ceiling, ...]:
    a, b = torch.zeros(COPIED // 4), torch.ones(COPIED // 4)
    return (Ceiling(f"copy of {COPIED >> 20} MiB, read and written", "GB", 2 * COPIED / 1e9, lambda: b.copy_(a)),)


def convolutions() -> tuple[Ceiling, ...]:
    def of(dtype: torch.dtype) -> Ceiling:
        x = torch.randn(IMAGES, CHANNELS, CELLS, CELLS).to(dtype, memory_format=torch.channels_last)
        w = torch.randn(CHANNELS, CHANNELS, 3, 3).to(dtype, memory_format=torch.channels_last)
        operations = 2 * IMAGES * CELLS**2 * CHANNELS**2 * 9
        return Ceiling(f"{str(dtype).removeprefix('torch.')} convolution", "GFLOP", operations / 1e9, lambda: functional.conv2d(x, w, padding=1))

    return of(torch.bfloat16), of(torch.float32)


def products() -> tuple[Ceiling, ...]:
    def of(dtype: torch.dtype) -> Ceiling:
        a = torch.randn(SIDE, SIDE).to(dtype)
        return Ceiling(f"{str(dtype).removeprefix('torch.')} matrix product", "GFLOP", 2 * SIDE**3 / 1e9, lambda: a @ a)

    return of(torch.bfloat16), of(torch.float32)


def decoding(files: Sequence[bytes], threads: int) -> tuple[Ceiling, ...]:
    """Whole pictures to RGB in memory, by every decoder at hand."""

    def simplejpeg(some: Sequence[bytes]) -> None:
        from simplejpeg import decode_jpeg

        room = np.empty(640 * 640 * 3, np.uint8)  # without it, a third of the time goes to getting memory
        for file in some:
            decode_jpeg(file, buffer=room)

    def pil(some: Sequence[bytes]) -> None:
        for file in some:
            np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))

    def of(name: str, decode: Callable[[Sequence[bytes]], None]) -> Ceiling:
        def run() -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(decode, [files[first::threads] for first in range(threads)]))

        return Ceiling(f"{name}, {threads} thread{'s' * (threads > 1)}", "images", len(files), run)

    at_hand = {"PIL": pil}
    if importlib.util.find_spec("simplejpeg"):
        at_hand["simplejpeg"] = simplejpeg
    return tuple(of(name, decode) for name, decode in at_hand.items())


def sorting() -> tuple[Ceiling, ...]:
    scores = np.random.default_rng(1).random(SORTED, np.float32)
    return (Ceiling("sorting float32, one thread", "million", SORTED / 1e6, lambda: np.sort(scores)),)


def machine_rates(files: Sequence[bytes], threads: int, rounds: int, least: float) -> list[Figure]:
    """All of them in the same rounds, in their own units."""
    all_of_them = (*decoding(files, threads), *products(), *convolutions(), *copying(), *sorting())
    cases: Cases = {ceiling.name: ceiling.run for ceiling in all_of_them}
    found = []
    for ceiling, seconds in zip(all_of_them, interleaved(cases, rounds, least=least).values(), strict=True):
        rates = sorted(ceiling.amount / s for s in seconds)
        found.append(Figure(ceiling.name, median(rates), f"{ceiling.unit}/s", runs=rounds, spread=(rates[0], rates[-1])))
    return found
